"""The covariance of a cache's K and V, with what finitely many tokens can say about it.

Eigenvalues of a covariance estimated from n tokens are too spread out (Marchenko and Pastur), which makes a cache look
more compressible than it is: a limit from them is too low. So directions are learned from half the tokens and variances
measured on the other half, and the other way round. Variances along any directions are majorised by the eigenvalues,
so that limit is, on average, not too low. Both are kept: ``plug_in`` below, ``held_out`` above.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from kvsim.errors import InvalidSpec
from kvsim.limit.rate_distortion import Spectrum
from kvsim.numerics.arrays import DoubleArray
from kvsim.tensors import KvTensors, TensorName
from kvsim.tensors.layout import bare_keys, by_token

Scope = Literal["head", "layer"]
BLOCK_TOKENS: Final = 32
"""Neighbouring tokens are alike, so halves take turns block by block and not token by token."""
MIN_TOKENS: Final = 4 * BLOCK_TOKENS
REFERENCE_BITS: Final = 2.0
"""Rate at which keys before and after RoPE, and both estimates of a limit, are compared."""


@dataclass(frozen=True, eq=False)
class Component:
    """One vector per token whose covariance was measured: of one head, or of all heads of a layer.

    Attributes
    ----------
    plug_in, held_out : Spectrum
        Variances relative to the mean energy per value, mean of the tokens taken off.
    before_rope : bool
        Whether keys were turned back first, which a decoder can do as it knows the positions.
    """

    tensor: TensorName
    layer: int
    head: int | None
    num_tokens: int
    plug_in: Spectrum
    held_out: Spectrum
    before_rope: bool = False


@dataclass(frozen=True, eq=False)
class CovarianceLimit:
    """Reverse water-filling over several vectors at once, bits divided freely among them.

    The error is the mean over vectors of error over energy, each weighted by its number of values.
    """

    components: tuple[Component, ...]
    held_out: Spectrum
    plug_in: Spectrum

    @staticmethod
    def of(components: Sequence[Component]) -> CovarianceLimit:
        """Join the spectra of ``components``."""
        return CovarianceLimit(
            tuple(components),
            Spectrum.joined([one.held_out for one in components]),
            Spectrum.joined([one.plug_in for one in components]),
        )

    def only(self, tensor: TensorName) -> CovarianceLimit:
        """The limit of K alone, or of V."""
        return CovarianceLimit.of([one for one in self.components if one.tensor == tensor])

    def within(self, layers: AbstractSet[int]) -> CovarianceLimit:
        """The limit of some layers."""
        if layers >= {one.layer for one in self.components}:
            return self
        return CovarianceLimit.of([one for one in self.components if one.layer in layers])


def covariance_limit(caches: Sequence[KvTensors], scope: Scope = "head") -> CovarianceLimit:
    """Measure every K and V vector of caches of one model, each head by itself or all heads of a layer together.

    Raises
    ------
    InvalidSpec
        There are too few tokens, or caches differ in layers, heads or channels.
    """
    _check(caches)
    components: list[Component] = []
    for layer in range(caches[0].num_layers):
        heads: list[int | None] = [None] if scope == "layer" else list(range(caches[0].layers[layer].num_kv_heads))
        components += [_component(caches, layer, head, tensor) for head in heads for tensor in ("key", "value")]
    return CovarianceLimit.of([one for one in components if one.held_out.size])


def _check(caches: Sequence[KvTensors]) -> None:
    tokens = min((layer.num_tokens for cache in caches for layer in cache.layers), default=0)
    if tokens < MIN_TOKENS:
        msg = f"a covariance needs at least {MIN_TOKENS} tokens in every layer, the cache has {tokens}"
        raise InvalidSpec(msg)
    shapes = {
        tuple((layer.num_kv_heads, layer.keys.shape[2], layer.values.shape[2]) for layer in cache.layers)
        for cache in caches
    }
    if len(shapes) > 1:
        msg = "caches measured together must be of one model: they differ in layers, heads or channels"
        raise InvalidSpec(msg)


def _component(caches: Sequence[KvTensors], layer: int, head: int | None, tensor: TensorName) -> Component:
    cached = _vectors(caches, layer, head, tensor, undo_rope=False)
    found = _measured(cached, tensor, layer, head, before_rope=False)
    if tensor == "key" and all(cache.rope is not None for cache in caches):
        turned_back = _measured(
            _vectors(caches, layer, head, tensor, undo_rope=True), tensor, layer, head, before_rope=True
        )
        if turned_back.held_out.distortion(REFERENCE_BITS) < found.held_out.distortion(REFERENCE_BITS):
            return turned_back
    return found


def _vectors(
    caches: Sequence[KvTensors], layer: int, head: int | None, tensor: TensorName, *, undo_rope: bool
) -> list[DoubleArray]:
    """One (n, d) array per cache; d counts all heads where ``head`` is None."""
    found = []
    for cache in caches:
        one = cache.layers[layer]
        array = bare_keys(one, cache.rope) if undo_rope else one.tensor(tensor)
        found.append(by_token(array if head is None else array[head : head + 1]).astype(np.float64))
    return found


def _measured(
    vectors: Sequence[DoubleArray], tensor: TensorName, layer: int, head: int | None, *, before_rope: bool
) -> Component:
    halves = [np.concatenate([_half(one, which) for one in vectors]) for which in (0, 1)]
    together = np.concatenate(halves)
    energy = float((together**2).mean())
    scale = 1.0 / energy if energy else 0.0
    crossed = (_along(halves[0], halves[1]) + _along(halves[1], halves[0])) / 2
    # The mean of one half misses the other's by a little, which must not lift the limit above the isotropic one.
    crossed *= min(1.0, energy / crossed.mean()) if energy else 0.0
    return Component(
        tensor,
        layer,
        head,
        len(together),
        plug_in=Spectrum.of(scale * _along(together, together)),
        held_out=Spectrum.of(scale * crossed),
        before_rope=before_rope,
    )


def _half(vectors: DoubleArray, which: int) -> DoubleArray:
    turn = (np.arange(len(vectors)) // BLOCK_TOKENS) % 2
    half: DoubleArray = vectors[turn == which]
    return half


def _along(learned: DoubleArray, measured: DoubleArray) -> DoubleArray:
    """Variances of ``measured`` about the mean and along the principal axes of ``learned``, the largest axis first."""
    mean = learned.mean(axis=0)
    centred = learned - mean
    _, axes = np.linalg.eigh(centred.T @ centred)
    variances: DoubleArray = (((measured - mean) @ axes[:, ::-1]) ** 2).mean(axis=0)
    return variances
