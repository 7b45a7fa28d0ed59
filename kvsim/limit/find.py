"""From KV tensors to the answer: limits first, then every encoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from kvsim.compression import STRATEGIES, Compression, parse_compression
from kvsim.errors import InvalidSpec, KvsimError
from kvsim.limit.answer import CURVE_BITS, HeadLimit, LimitAnswer, LimitCurve, NotMeasured
from kvsim.limit.covariance import REFERENCE_BITS, Component, CovarianceLimit, covariance_limit
from kvsim.limit.points import EncodingPoint, measure_point
from kvsim.limit.rate_distortion import isotropic_bits, isotropic_distortion, sphere_distortion
from kvsim.limit.token_ids import TokenIdTier
from kvsim.tensors import KvTensors

Progress = Callable[[float], None]
TABLE_BITS: Final = (1.0, 2.0, 3.0, 4.0)


def default_strategies() -> tuple[str, ...]:
    """Every named strategy that keeps all tokens."""
    return tuple(name for name in STRATEGIES if parse_compression(name).keeps_all_tokens)


def find_limit(
    caches: Sequence[KvTensors],
    samples: Sequence[KvTensors] = (),
    strategies: Sequence[str] | None = None,
    *,
    token_ids: TokenIdTier | None = None,
    progress: Progress | None = None,
) -> LimitAnswer:
    """Measure limits and points.

    Parameters
    ----------
    caches : sequence of KvTensors
        What is measured; of one model.
    samples : sequence of KvTensors
        Other sequences, for codecs that calibrate.
    strategies : sequence of str, optional
        Names; all that keep every token where None.

    Raises
    ------
    InvalidSpec
        No cache is given, or there are too few tokens for a covariance.
    UnknownName
        There is no such strategy.
    """
    if not caches:
        msg = "no KV tensors are given"
        raise InvalidSpec(msg)
    chosen = {
        name: parse_compression(name) for name in (strategies if strategies is not None else default_strategies())
    }
    head_limit, layer_limit = covariance_limit(caches), covariance_limit(caches, "layer")
    points, missing = _points(chosen, caches, samples, (head_limit, layer_limit), progress)
    first = caches[0].layers[0]
    return LimitAnswer(
        source="; ".join(dict.fromkeys(cache.source for cache in caches)),
        num_caches=len(caches),
        num_layers=caches[0].num_layers,
        num_kv_heads=first.num_kv_heads,
        key_dim=first.keys.shape[2],
        value_dim=first.values.shape[2],
        num_tokens=sum(cache.layers[0].num_tokens for cache in caches),
        curve=_curve(head_limit, layer_limit, first.keys.shape[2]),
        heads=tuple(_head(component) for component in head_limit.components),
        points=tuple(sorted(points, key=lambda point: -point.bits_per_value)),
        not_measured=tuple(missing),
        token_ids=token_ids,
        notes=_notes(head_limit, layer_limit, points),
    )


def _points(
    chosen: Mapping[str, Compression],
    caches: Sequence[KvTensors],
    samples: Sequence[KvTensors],
    limits: tuple[CovarianceLimit, CovarianceLimit],
    progress: Progress | None,
) -> tuple[list[EncodingPoint], list[NotMeasured]]:
    """Measure what can be measured, and say of the rest why not."""
    points, missing = [], []
    for done, (name, compression) in enumerate(chosen.items()):
        try:
            points.append(measure_point(compression, caches, samples, *limits))
        except KvsimError as error:
            missing.append(NotMeasured(strategy=name, reason=str(error)))
        if progress is not None:
            progress((done + 1) / len(chosen))
    return points, missing


def _curve(head: CovarianceLimit, layer: CovarianceLimit, dim: int) -> LimitCurve:
    tensors = {component.tensor for component in head.components}
    return LimitCurve(
        isotropic=tuple(isotropic_distortion(bits) for bits in CURVE_BITS),
        sphere=tuple(sphere_distortion(bits, dim) for bits in CURVE_BITS),
        head=tuple(head.held_out.distortion(bits) for bits in CURVE_BITS),
        head_plug_in=tuple(head.plug_in.distortion(bits) for bits in CURVE_BITS),
        layer=tuple(layer.held_out.distortion(bits) for bits in CURVE_BITS),
        layer_plug_in=tuple(layer.plug_in.distortion(bits) for bits in CURVE_BITS),
        key=tuple(head.only("key").held_out.distortion(bits) for bits in CURVE_BITS),
        value=tuple(head.only("value").held_out.distortion(bits) for bits in CURVE_BITS)
        if "value" in tensors
        else None,
    )


def _head(component: Component) -> HeadLimit:
    spectrum = component.held_out
    return HeadLimit(
        tensor=component.tensor,
        layer=component.layer,
        head=component.head or 0,
        before_rope=component.before_rope,
        mean_share=max(0.0, 1.0 - spectrum.variance),
        saved_bits=isotropic_bits(spectrum.distortion(REFERENCE_BITS)) - REFERENCE_BITS,
        distortion_at_bits=tuple(spectrum.distortion(bits) for bits in TABLE_BITS),
    )


def _notes(head: CovarianceLimit, layer: CovarianceLimit, points: Sequence[EncodingPoint]) -> tuple[str, ...]:
    """What a reader must know of these limits, and of points below them."""
    notes = [
        "covariances are estimated: directions learned on half of the tokens, variances measured on the other half, so "
        f"that a limit is not too low; plain sample eigenvalues would lie {_spread(head):.3g} bits per value lower for "
        f"single heads and {_spread(layer):.3g} for all heads of a layer, at {REFERENCE_BITS:g} bits"
    ]
    if any(component.before_rope for component in head.components):
        notes.append(
            "keys are taken before RoPE where they vary less there: positions are known, so undoing it is free"
        )
    below = [point.strategy for point in points if point.applies == "none"]
    if below:
        notes.append(
            f"{', '.join(below)}: below every limit here. Reverse water-filling is the limit of Gaussian vectors "
            "coded one by one within a layer; a code may pass it by what layers or neighbouring tokens share, or where "
            "vectors are far from Gaussian (outliers, clusters, tokens of very different norm)"
        )
    return tuple(notes)


def _spread(limit: CovarianceLimit) -> float:
    """Bits per value between both estimates of a limit."""
    return REFERENCE_BITS - limit.plug_in.bits(limit.held_out.distortion(REFERENCE_BITS))
