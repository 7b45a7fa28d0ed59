"""The KV cache of one sequence, with the queries that read it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final, Literal, TypeAlias, TypeVar

import numpy as np

from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import BoolArray, DoubleArray, FloatArray, IntArray

_AnyFloat = TypeVar("_AnyFloat", FloatArray, DoubleArray)
TensorName: TypeAlias = Literal["key", "value"]
TENSORS: Final[tuple[TensorName, ...]] = ("key", "value")
SignalName: TypeAlias = Literal["hidden", "repeat_queries", "entropy", "distance"]
SIGNALS: Final[tuple[SignalName, ...]] = ("hidden", "repeat_queries", "entropy", "distance")
"""What `PromptSignals` may hold; ``repeat_queries`` stands for the keys of the second reading as well."""
ENTROPY_CANDIDATES: Final = 256
"""Likeliest next tokens over which the signal ``entropy`` is taken (InfoKV, arXiv 2606.26875)."""
REPEAT_CHUNK: Final = 2048
"""Tokens that a second reading takes at a time, each chunk right after the whole prompt (kvpress's KVzip)."""


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

    def mean_rotation(self, dim: int, positions: IntArray) -> DoubleArray:
        """Mean over positions, (p,), of the matrix R that turns a column of ``dim`` channels: (dim, dim)."""
        angles = positions[:, None].astype(np.float64) * self.inverse_frequencies.astype(np.float64)
        turned: DoubleArray = self._mixed(np.eye(dim), np.cos(angles).mean(axis=0), np.sin(angles).mean(axis=0))
        return turned.T

    def _turn(self, vectors: FloatArray, positions: IntArray, direction: float) -> FloatArray:
        angles = positions[..., None].astype(np.float64) * self.inverse_frequencies.astype(np.float64) * direction
        turned: FloatArray = self._mixed(vectors, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
        return turned

    def _mixed(self, vectors: _AnyFloat, cosine: _AnyFloat, sine: _AnyFloat) -> _AnyFloat:
        half = len(self.inverse_frequencies)
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
    log_weights : (H, n) or None
        Added to the logits of each entry: an entry that stands for w tokens has ln w, one that no query may see has
        -inf. None is 0 everywhere. Every head has a finite one.
    """

    keys: FloatArray
    values: FloatArray
    positions: IntArray
    queries: FloatArray
    prompt_queries: FloatArray
    log_weights: FloatArray | None = None

    def __post_init__(self) -> None:
        heads, tokens, key_dim = self.keys.shape
        if self.values.shape[:2] != (heads, tokens) or self.positions.shape != (heads, tokens):
            shapes = f"keys {self.keys.shape}, values {self.values.shape}, positions {self.positions.shape}"
            msg = f"KV tensors of one layer disagree in heads or tokens: {shapes}"
            raise InvalidSpec(msg)
        if self.log_weights is not None and self.log_weights.shape != (heads, tokens):
            msg = f"log_weights {self.log_weights.shape} do not fit keys {self.keys.shape}: (heads, tokens)"
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
        """Entries per head, those of -inf log-weight included."""
        return int(self.keys.shape[1])

    @property
    def is_seen(self) -> BoolArray:
        """Which entries queries may see at all, (H, n)."""
        if self.log_weights is None:
            return np.ones(self.keys.shape[:2], dtype=bool)
        return np.isfinite(self.log_weights)

    @property
    def seen_share(self) -> float:
        """Share of the entries that queries may see."""
        return 1.0 if self.log_weights is None else float(self.is_seen.mean())

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
            log_weights=None if self.log_weights is None else np.take_along_axis(self.log_weights, indices, axis=1),
        )

    def take_ragged(self, is_kept: BoolArray) -> LayerKv:
        """Keep different numbers of tokens per head, (H, n); every head keeps one at least.

        Heads that keep fewer are filled up in front with their first token again, at log-weight -inf, so that the
        newest tokens of all heads stand side by side.

        Raises
        ------
        InvalidSpec
            A head keeps nothing.
        """
        counts = is_kept.sum(axis=1)
        if not counts.all():
            msg = f"KV head {int(counts.argmin())} would keep no token; every head keeps one at least"
            raise InvalidSpec(msg)
        slots = np.arange(counts.max()) - (counts.max() - counts)[:, None]
        # A stable sort puts kept tokens first, in order.
        order = np.argsort(~is_kept, axis=1, kind="stable")
        kept = self.take(np.take_along_axis(order, np.maximum(slots, 0), axis=1))
        return kept if (slots >= 0).all() else kept.hidden_where(slots < 0)

    def hidden_where(self, is_hidden: BoolArray) -> LayerKv:
        """Let no query see the entries of (H, n)."""
        own = np.zeros(self.keys.shape[:2], dtype=np.float32) if self.log_weights is None else self.log_weights
        return replace(self, log_weights=np.where(is_hidden, -np.inf, own).astype(np.float32))

    def emptied(self) -> LayerKv:
        """Leave no channels and no queries: a layer whose numbers lie elsewhere."""
        queries = self.queries[:, :0]
        bare = replace(self, queries=queries, prompt_queries=queries)
        return replace(bare, keys=self.keys[..., :0], values=self.values[..., :0])


@dataclass(frozen=True, eq=False)
class PromptSignals:
    """What a prefill knows of its tokens beside K, V and Q, where somebody took it down.

    Attributes
    ----------
    hidden : tuple of (n, width), or None
        Per layer, what its attention block reads: hidden states after the norm.
    repeat_queries : tuple of (Hq, n, D), or None
        Per layer, queries of a second reading of the prompt, after the first (KVzip's reconstruction): that of each
        token. Every `REPEAT_CHUNK` tokens are read anew, right after the prompt and, of models that follow one, a
        request to repeat it.
    repeat_keys : tuple of (H, n, D), or None
        Keys of the same tokens in the second reading; with ``repeat_queries`` or not at all.
    entropy : (n,) or None
        Of the next token after each one, over the likeliest 256 candidates, in nats.
    distance : (L, n) or None
        Cosine distance of each layer's output from the last layer's.
    """

    hidden: tuple[FloatArray, ...] | None = None
    repeat_queries: tuple[FloatArray, ...] | None = None
    repeat_keys: tuple[FloatArray, ...] | None = None
    entropy: FloatArray | None = None
    distance: FloatArray | None = None

    def __post_init__(self) -> None:
        if (self.repeat_queries is None) != (self.repeat_keys is None):
            msg = "signals repeat_queries and repeat_keys come together: both are of the second reading"
            raise InvalidSpec(msg)

    def check(self, method: str, names: Iterable[SignalName]) -> None:
        """Raise InvalidSpec where a method needs a signal that nobody took down."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            msg = (
                f"{method} needs {' and '.join(missing)} of the prompt, which these KV tensors do not have; a model's "
                f"can be recorded with `kvsim quality capture --signals {','.join(missing)}`"
            )
            raise InvalidSpec(msg)


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
    signals : PromptSignals
    """

    layers: tuple[LayerKv, ...]
    rope: Rope | None
    attention_scale: float
    source: str
    native_bits: int = 16
    needles: tuple[int, ...] = field(default=())
    signals: PromptSignals = field(default_factory=PromptSignals)

    @property
    def num_layers(self) -> int:
        """Layers with a cache."""
        return len(self.layers)

    def without_queries(self) -> KvTensors:
        """Drop queries, which mean nothing to keys of a reduced width."""
        empty = np.zeros((0, 0, 0), dtype=np.float32)
        return replace(self, layers=tuple(replace(layer, queries=empty, prompt_queries=empty) for layer in self.layers))
