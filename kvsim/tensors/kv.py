"""The KV cache of one sequence, with the queries that read it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, Literal, TypeAlias

import numpy as np

from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import FloatArray, IntArray

TensorName: TypeAlias = Literal["key", "value"]
TENSORS: Final[tuple[TensorName, ...]] = ("key", "value")


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary position embedding in the half-split layout of Hugging Face's Llama (arXiv 2104.09864).

    Attributes
    ----------
    inverse_frequencies : (rotary_dim / 2,)
        Radians per position; channels from ``rotary_dim`` on are left alone.
    """

    inverse_frequencies: FloatArray

    @staticmethod
    def plain(head_dim: int, theta: float) -> Rope:
        """Frequencies ``theta ** (-2 i / head_dim)`` over the whole head."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
        return Rope((theta**-exponents).astype(np.float32))

    def rotate(self, vectors: FloatArray, positions: IntArray) -> FloatArray:
        """Turn vectors, (..., n, D), by their positions, broadcastable to (..., n)."""
        return self._turn(vectors, positions, 1.0)

    def undo(self, vectors: FloatArray, positions: IntArray) -> FloatArray:
        """Invert `rotate`."""
        return self._turn(vectors, positions, -1.0)

    def _turn(self, vectors: FloatArray, positions: IntArray, direction: float) -> FloatArray:
        half = len(self.inverse_frequencies)
        angles = positions[..., None].astype(np.float64) * self.inverse_frequencies.astype(np.float64) * direction
        cosine, sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        first, second = vectors[..., :half], vectors[..., half : 2 * half]
        turned = (first * cosine - second * sine, second * cosine + first * sine, vectors[..., 2 * half :])
        return np.concatenate(turned, axis=-1)


@dataclass(frozen=True, eq=False)
class LayerKv:
    """One layer's cache and the queries that read it; keys and queries are after RoPE, as engines cache them.

    Attributes
    ----------
    keys : (H, n, D)
        fp32, of H KV heads.
    values : (H, n, Dv)
    positions : (H, n)
        Position of each held token in the sequence; heads may hold different tokens.
    queries : (Hq, m, D)
        Queries that come after the cached tokens, so each sees all of them. Hq is a multiple of H; query head i reads
        KV head ``i // (Hq / H)``.
    prompt_queries : (Hq, w, D)
        The last w queries of the prompt itself, which a method may look at when it compresses.
    """

    keys: FloatArray
    values: FloatArray
    positions: IntArray
    queries: FloatArray
    prompt_queries: FloatArray

    def __post_init__(self) -> None:
        heads, tokens, key_dim = self.keys.shape
        if self.values.shape[:2] != (heads, tokens) or self.positions.shape != (heads, tokens):
            shapes = f"keys {self.keys.shape}, values {self.values.shape}, positions {self.positions.shape}"
            msg = f"KV tensors of one layer disagree in heads or tokens: {shapes}"
            raise InvalidSpec(msg)
        for name, queries in (("queries", self.queries), ("prompt_queries", self.prompt_queries)):
            if queries.ndim != 3 or queries.shape[0] % heads or (queries.size and queries.shape[2] != key_dim):
                msg = f"{name} {queries.shape} do not fit keys {self.keys.shape}: (query heads, queries, head_dim)"
                raise InvalidSpec(msg)

    @property
    def num_kv_heads(self) -> int:
        """H."""
        return int(self.keys.shape[0])

    @property
    def num_tokens(self) -> int:
        """Tokens held per head."""
        return int(self.keys.shape[1])

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return int(self.queries.shape[0]) // self.num_kv_heads

    def tensor(self, name: TensorName) -> FloatArray:
        """Keys or values."""
        return self.keys if name == "key" else self.values

    def take(self, indices: IntArray) -> LayerKv:
        """Keep the tokens with these indices, (H, kept), head by head."""
        rows = indices[..., None]
        return LayerKv(
            keys=np.take_along_axis(self.keys, rows, axis=1),
            values=np.take_along_axis(self.values, rows, axis=1),
            positions=np.take_along_axis(self.positions, indices, axis=1),
            queries=self.queries,
            prompt_queries=self.prompt_queries,
        )

    def emptied(self) -> LayerKv:
        """Leave no channels and no queries: a layer whose numbers lie elsewhere."""
        queries = self.queries[:, :0]
        return LayerKv(self.keys[..., :0], self.values[..., :0], self.positions, queries, queries)


@dataclass(frozen=True, eq=False)
class KvTensors:
    """The KV cache of one sequence after its prompt, layer by layer.

    Attributes
    ----------
    layers : tuple of LayerKv
        Layers that keep K and V per head.
    rope : Rope or None
        How keys were turned, so that a method can undo it; None where they were not, or it is unknown.
    attention_scale : float
        What logits are multiplied by, 1 / sqrt(head_dim) as a rule.
    native_bits : int
        Bits of one element of the uncompressed cache: 16 for bf16 and fp16.
    source : str
        Where the tensors come from: an ensemble with its seed, a model, a file.
    needles : tuple of int
        Positions of tokens that the queries are known to look for, if any.
    """

    layers: tuple[LayerKv, ...]
    rope: Rope | None
    attention_scale: float
    source: str
    native_bits: int = 16
    needles: tuple[int, ...] = field(default=())

    @property
    def num_layers(self) -> int:
        """Layers with a cache."""
        return len(self.layers)

    def without_queries(self) -> KvTensors:
        """Drop queries, which mean nothing to keys of a reduced width."""
        empty = np.zeros((0, 0, 0), dtype=np.float32)
        return replace(self, layers=tuple(replace(layer, queries=empty, prompt_queries=empty) for layer in self.layers))
