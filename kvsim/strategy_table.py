"""Every strategy beside the others for one model: bytes, kernels, what its decode price rests on, known risk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Final

from kvsim.catalog import resolve
from kvsim.compression import STRATEGIES, Compression, describe_strategy, parse_compression, stored_bytes
from kvsim.compression.base import StrategyPart
from kvsim.compression.selection.scorers import ScorerBackedSelection
from kvsim.compression.strategy import spell
from kvsim.cost.basis import DECODE, pricings, weakest
from kvsim.errors import IncompatibleScenario, UnknownName
from kvsim.kernel_catalog import load_compiled_kernels
from kvsim.model_catalog import load_model
from kvsim.quality.layers import RiskLayers, risk_layers
from kvsim.scenario import Scenario
from kvsim.specs.base import Basis, Spec
from kvsim.specs.model import ModelSpec

WORKLOAD: Final = "chat"
"""Any will do: the table asks for no load."""
OPERATIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "snapkv": ("score/snapkv", "select/compaction"),
    "pyramidkv": ("score/snapkv", "select/compaction"),
    "h2o": ("score/h2o", "select/compaction"),
    "tova": ("score/tova", "select/compaction"),
    "knorm": ("score/knorm", "select/compaction"),
    "keydiff": ("score/keydiff", "select/compaction"),
    "expected_attention": ("score/expected_attention", "select/compaction"),
    "qfilter": ("select/compaction",),
    "chunkkv": ("score/snapkv", "select/compaction"),
    "lagkv": ("select/compaction",),
    "cur": ("select/compaction",),
    "random": ("select/compaction",),
    "prefill_decoding": ("select/compaction",),
    "rkv": ("select/compaction",),
    "infokv": ("score/infokv", "score/snapkv", "select/compaction"),
    "merging": ("select/merge", "select/compaction"),
    "cam": ("score/h2o", "select/compaction"),
    "d2o": ("score/h2o", "select/compaction"),
    "quest": ("score/quest", "decode_attention/page_sparse"),
    "nsa": ("decode_attention/page_sparse",),
    "dsa": ("decode_attention/topk",),
    "weighted_atoms": (
        "select/weighted_atoms",
        "select/top_k",
        "select/compaction",
        "decode_attention/ragged_heads/native_log_weight",
    ),
    "adakv": ("select/top_k", "select/compaction", "decode_attention/ragged_heads/native/"),
    "duo_attention": ("select/compaction", "decode_attention/ragged_heads/native/"),
    "rans": ("entropy/rans",),
    "kvtc": ("transform/kvtc",),
}
"""Beginnings of variants of ours that are named by what they do and not by a KV format, by the part's kind."""


class StrategyRow(Spec):
    """One strategy for one model."""

    name: str
    family: str
    description: str
    bytes_per_token: float | None
    """Of one kept token in all layers, metadata included, residual windows not; None where the model cannot run it."""
    bits_per_value: float | None
    """The same over the model's K and V values per token."""
    fold: float | None
    """Native bytes over all that is held, residual windows included, after a prompt of ``context_tokens``."""
    context_tokens: int
    kernels: tuple[str, ...]
    """Variants of ours: append, decode attention, scoring, selection, coding. Empty: none yet."""
    decode_basis: Basis | None
    """What the price of reading the cache in a decode step rests on, on ``device``."""
    device: str
    risk: RiskLayers
    frees_memory: bool | None
    """Whether ``fold`` is above 1; not where tokens are merely masked, or all are held and more."""
    masked_in: str | None = None
    """Public code that merely masks what the strategy drops, and so frees nothing, with its files."""
    freed_in: str | None = None
    """Public code that frees it, where other code masks."""
    cannot_run: str | None = None
    """Why this model or device cannot run it."""


def families(names: Iterable[str] = STRATEGIES) -> tuple[str, ...]:
    """Families of strategies, in order of appearance."""
    return tuple(dict.fromkeys(one for name in names for one in parse_compression(name).families))


def strategy_table(
    model: str, device: str, context_tokens: int, family: str | None = None, names: Iterable[str] = STRATEGIES
) -> tuple[StrategyRow, ...]:
    """Give a row per strategy.

    Raises
    ------
    UnknownName
        There is no such model, device, family or strategy.
    """
    names = tuple(names)
    if family is not None and family not in families(names):
        raise UnknownName(kind="family", name=family, known=families(names))
    spec = load_model(model)
    chosen = {name: parse_compression(name) for name in names}
    return tuple(
        _row(name, compression, model, spec, device, context_tokens)
        for name, compression in chosen.items()
        if family is None or family in compression.families
    )


def _row(
    name: str, compression: Compression, model: str, spec: ModelSpec, device: str, context_tokens: int
) -> StrategyRow:
    basis, reason = _decode_basis(compression, model, device)
    per_token = _bytes_per_token(compression, spec) if reason is None else None
    values = sum(group.kv_elements_per_token * group.num_layers for group in spec.groups)
    native, mine = (stored_bytes(one, spec, context_tokens, 0) for one in (Compression(), compression))
    fold = native / mine if reason is None and mine else None
    return StrategyRow(
        name=name,
        family=compression.family,
        description=describe_strategy(name),
        bytes_per_token=per_token,
        bits_per_value=8 * per_token / values if per_token is not None and values else None,
        fold=fold,
        context_tokens=context_tokens,
        kernels=tuple(kernels_of(compression, is_latent=any(group.is_latent for group in spec.groups))),
        decode_basis=basis,
        device=device,
        risk=risk_layers(compression),
        frees_memory=None if fold is None else fold > 1,
        masked_in=_joined(part.masked_in for part in compression.active_parts),
        freed_in=_joined(part.freed_in for part in compression.active_parts),
        cannot_run=reason,
    )


def _joined(texts: Iterable[str | None]) -> str | None:
    return "; ".join(text for text in texts if text is not None) or None


def _bytes_per_token(compression: Compression, model: ModelSpec) -> float:
    return sum(
        compression.encoding_for_layer(index, model).bytes_per_token(group, model.dtype).total_bytes
        for group in model.kv_groups
        for index in group.layers
    )


@lru_cache(maxsize=512)
def _decode_basis(compression: Compression, model: str, device: str) -> tuple[Basis | None, str | None]:
    """(basis, None), or (None, why it cannot run); (None, None) for what lies in tiers and attention never reads."""
    scenario = Scenario(model=model, device=device, workload=WORKLOAD, compression=compression)
    is_readable = compression.refused_in_pool is None
    try:
        deployment = resolve(scenario, in_pool=is_readable)
    except IncompatibleScenario as error:
        return None, str(error)
    if not is_readable:
        return None, None
    if deployment.engine_fit is not None:
        return deployment.engine_fit.basis, None
    kernels = [one.kernel for one in pricings(deployment) if one.operation == DECODE]
    if kernels and all(kernels):
        return weakest(kernel.basis for kernel in kernels if kernel is not None), None
    unpacks = any(one.encoding.unpack_family is not None for one in deployment.layer_classes)
    return Basis.LITERATURE if unpacks else Basis.DATASHEET, None


def kernels_of(compression: Compression, *, is_latent: bool = False) -> Iterator[str]:
    """Variants of ours that make, read or choose this strategy's cache; ``is_latent`` on a model with MLA."""
    parts = compression.active_parts
    wanted = {_plain(name) for part in parts for name in _spellings(part)}
    if compression.stores_native:
        wanted.add("native")
    prefixes = tuple(prefix for part in parts for kind in _kinds(part) for prefix in OPERATIONS.get(kind, ()))
    for kernel in load_compiled_kernels():
        is_of_format = kernel.operation in ("append", "decode_attention") or kernel.operation.startswith("low_rank")
        is_of_model = is_of_format and is_latent == ("mla" in (kernel.kv_format or ""))
        named = {_plain(kernel.strategy or ""), _plain(kernel.kv_format or "")}
        if kernel.variant.startswith(prefixes) or (is_of_model and named & wanted):
            yield kernel.variant


def _kinds(part: StrategyPart) -> Iterator[str]:
    """Name of a part's algorithm, and of the scorer that it puts to use."""
    yield part.kind
    if isinstance(part, ScorerBackedSelection):
        yield part.scorer


def _spellings(part: StrategyPart) -> Iterator[str]:
    """Name of a part, and the name with its bits where they are the default and so not spoken."""
    yield spell(part)
    bits = getattr(part, "bits", None)
    if bits is not None and "bits" in part.inline_fields:
        yield f"{spell(part)}:{bits:g}"


def _plain(name: str) -> str:
    return name.replace(":", "_").replace("-", "_")
