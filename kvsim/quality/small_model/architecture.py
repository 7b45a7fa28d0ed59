"""The small transformer: a decoder with RoPE, RMSNorm, grouped queries and a head dim of 64, as large models have.

Keys are cached after RoPE, in bf16. Variants change what is cached: smeared keys, one cache for two layers (CLA).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from kvsim.errors import InvalidSpec
from kvsim.quality.small_model.tasks import VOCABULARY

ARCHITECTURES: Final = ("plain", "smeared", "smeared-cla2")
"""What tells a key which token stood before it, without which nothing can be looked up: ``plain``, the embedding
knows it; ``smeared``, each key is mixed with the one before. ``cla2``: every second layer reads the cache of the one
below (arXiv 2405.12981)."""
MAX_POSITIONS: Final = 1024
SHARPNESS_RATE: Final = 5.0
SMEAR_START: Final = 3.0


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    architecture: str
    num_layers: int = 4
    width: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    mlp_width: int = 256
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            msg = f"no architecture {self.architecture!r}; there are {', '.join(ARCHITECTURES)}"
            raise InvalidSpec(msg)

    @property
    def smears(self) -> bool:
        """Whether keys are mixed with their predecessors."""
        return self.architecture.startswith("smeared")

    @property
    def has_bias(self) -> bool:
        """Whether queries, keys and values have a bias, as Qwen2's."""
        return self.architecture == "plain"

    @property
    def shifts_tokens(self) -> bool:
        """Whether a token's embedding is joined by a projection of the one before it.

        Something must tell a token what stood before it, or nothing can be looked up. Smeared keys do. Without
        either, a first layer has to learn to, which took longer than we wait (see docs/small-model.md).
        """
        return self.architecture == "plain"

    @property
    def layers_per_cache(self) -> int:
        """Layers that read one cache."""
        return 2 if self.architecture.endswith("cla2") else 1

    @property
    def num_caches(self) -> int:
        """Caches of the whole model."""
        return self.num_layers // self.layers_per_cache

    def as_dict(self) -> dict[str, object]:
        """Fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class NewKv:
    """K and V of the tokens in one forward pass, one layer that makes its own.

    Attributes
    ----------
    keys, values : (B, H, T, D)
        As cached: after smearing and RoPE.
    last_raw_key : (B, H, 1, D)
        Key of the last token before smearing and RoPE: what the next token's key is mixed with.
    """

    keys: Tensor
    values: Tensor
    last_raw_key: Tensor | None


@dataclass(frozen=True)
class PastKv:
    """What a cache holds of earlier tokens when new ones come.

    Attributes
    ----------
    keys, values : (B, H, n, D)
    visible : (B, H, n) or None
        Entries that may be read at all.
    raw_key : (B, H, 1, D) or None
        Key before smearing and RoPE of the token just before the new ones.
    read_mask : callable or None
        From queries (B, Hq, T, D) of a layer to which cached tokens each reads, (B, Hq, T, n).
    log_weights : (B, H, n) or None
        Added to the logits of cached entries; -inf hides one.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor | None = None
    raw_key: Tensor | None = None
    read_mask: Callable[[Tensor], Tensor] | None = None
    log_weights: Tensor | None = None


@dataclass(frozen=True)
class ForwardPass:
    """Logits, (B, T, vocabulary), and what each layer asked and cached.

    ``read``, what each layer's attention reads, and ``written``, what the layer puts out, (B, T, width), are empty
    unless they were asked for.
    """

    logits: Tensor
    queries: tuple[Tensor, ...]
    caches: tuple[NewKv, ...]
    read: tuple[Tensor, ...] = ()
    written: tuple[Tensor, ...] = ()


class RmsNorm(nn.Module):  # type: ignore[misc]  # torch is not installed where types are checked
    """Scale to unit root mean square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last axis."""
        return nnf.rms_norm(hidden, (hidden.shape[-1],), self.weight, 1e-6)


def rotate(vectors: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """RoPE in the half-split layout, as :class:`kvsim.tensors.Rope`; vectors (B, heads, T, D)."""
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class Attention(nn.Module):  # type: ignore[misc]  # torch is not installed where types are checked
    """Grouped-query attention; a layer without ``makes_kv`` reads the cache of a layer below."""

    def __init__(self, shape: Shape, *, makes_kv: bool) -> None:
        super().__init__()
        self.shape, self.makes_kv = shape, makes_kv
        self.query = nn.Linear(shape.width, shape.num_heads * shape.head_dim, bias=shape.has_bias)
        self.output = nn.Linear(shape.num_heads * shape.head_dim, shape.width, bias=False)
        if makes_kv:
            self.key_value = nn.Linear(shape.width, 2 * shape.num_kv_heads * shape.head_dim, bias=shape.has_bias)
            if shape.smears:
                # Half of the heads start on the token before, half on the own one: one that knows both mixes them up
                # wherever symbols repeat.
                signs = 1 - 2 * (torch.arange(shape.num_kv_heads) % 2)
                self.smear = nn.Parameter(SMEAR_START * signs.float().view(-1, 1, 1))

    def queries(self, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """(B, Hq, T, D), after RoPE."""
        return rotate(self._heads(self.query(hidden), self.shape.num_heads), *angles)

    def new_kv(self, hidden: Tensor, angles: tuple[Tensor, Tensor], raw_key_before: Tensor | None) -> NewKv:
        """K and V of new tokens."""
        keys, values = self.key_value(hidden).chunk(2, dim=-1)
        raw = self._heads(keys, self.shape.num_kv_heads)
        mixed = self._smeared(raw, raw_key_before) if self.shape.smears else raw
        last = raw[:, :, -1:] if self.shape.smears else None
        return NewKv(rotate(mixed, *angles), self._heads(values, self.shape.num_kv_heads), last)

    def _smeared(self, raw: Tensor, before: Tensor | None) -> Tensor:
        first = torch.zeros_like(raw[:, :, :1]) if before is None else before
        gate = torch.sigmoid(self.smear).to(raw.dtype)
        return (1 - gate) * raw + gate * torch.cat((first, raw[:, :, :-1]), dim=2)

    def _heads(self, flat: Tensor, heads: int) -> Tensor:
        return flat.unflatten(-1, (heads, self.shape.head_dim)).transpose(1, 2)

    def attend(self, queries: Tensor, new: NewKv, past: PastKv | None) -> Tensor:
        """Let queries read the cache and the new tokens up to their own."""
        group = self.shape.num_heads // self.shape.num_kv_heads
        keys, values = new.keys, new.values
        mask = None
        if past is not None:
            mask = _joint_mask(queries, past, group)
            keys, values = torch.cat((past.keys, keys), dim=2), torch.cat((past.values, values), dim=2)
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        mixed = nnf.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None)
        merged: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return merged


def _joint_mask(queries: Tensor, past: PastKv, group: int) -> Tensor:
    """(B, Hq, T, n + T): all that is held and read, and new tokens causally; added to logits where entries weigh."""
    count, heads, length = queries.shape[:3]
    held = past.keys.shape[2]
    seen = torch.ones(count, heads, length, held, dtype=torch.bool)
    if past.visible is not None:
        seen &= past.visible.repeat_interleave(group, dim=1)[:, :, None, :]
    if past.read_mask is not None:
        seen &= past.read_mask(queries)
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(count, heads, length, length)
    joint = torch.cat((seen, causal), dim=3)
    if past.log_weights is None:
        return joint
    added = torch.where(joint, 0.0, float("-inf"))
    added[..., :held] += past.log_weights.repeat_interleave(group, dim=1)[:, :, None, :]
    return added


class Block(nn.Module):  # type: ignore[misc]  # torch is not installed where types are checked
    """Attention and a gated MLP."""

    def __init__(self, shape: Shape, *, makes_kv: bool) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = RmsNorm(shape.width), RmsNorm(shape.width)
        self.attention = Attention(shape, makes_kv=makes_kv)
        self.up = nn.Linear(shape.width, 2 * shape.mlp_width, bias=False)
        self.down = nn.Linear(shape.mlp_width, shape.width, bias=False)

    def mlp(self, hidden: Tensor) -> Tensor:
        """SwiGLU."""
        gate, up = self.up(self.mlp_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(nnf.silu(gate) * up)


class SmallTransformer(nn.Module):  # type: ignore[misc]  # torch is not installed where types are checked
    """The model; embeddings are tied."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        if shape.shifts_tokens:
            self.shift = nn.Linear(shape.width, shape.width, bias=False)
        every = shape.layers_per_cache
        self.blocks = nn.ModuleList(Block(shape, makes_kv=index % every == 0) for index in range(shape.num_layers))
        self.norm = RmsNorm(shape.width)
        self.sharpness = nn.Parameter(torch.zeros(()))
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
        turns = torch.arange(MAX_POSITIONS, dtype=torch.float64)[:, None] * shape.rope_theta**-exponents
        self.register_buffer("cosine", turns.cos().float(), persistent=False)
        self.register_buffer("sine", turns.sin().float(), persistent=False)
        self.apply(_initialise)

    if TYPE_CHECKING:
        cosine: Tensor
        sine: Tensor

    def _embed(self, tokens: Tensor, token_before: Tensor | None) -> Tensor:
        embedded: Tensor = self.embedding(tokens)
        if not self.shape.shifts_tokens:
            return embedded
        first = torch.zeros_like(embedded[:, :1]) if token_before is None else self.embedding(token_before)
        return embedded + self.shift(torch.cat((first, embedded[:, :-1]), dim=1))

    @staticmethod
    def _dtype() -> torch.dtype:
        return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32

    def forward(
        self,
        tokens: Tensor,
        past: Sequence[PastKv] | None = None,
        start: int = 0,
        token_before: Tensor | None = None,
        *,
        round_kv: bool = False,
        keep_hidden: bool = False,
    ) -> ForwardPass:
        """Read tokens, (B, T), at positions from ``start``.

        ``past`` holds one entry per cache; ``token_before``, (B, 1), is the one just before ``start``.
        ``round_kv``: hold K and V in bf16, as a server does. ``keep_hidden``: give hidden states of all layers.
        """
        span = slice(start, start + tokens.shape[1])
        # Training runs under autocast, and single-precision angles would drag queries and keys up with them.
        angles = tuple(part[span].to(self._dtype()) for part in (self.cosine, self.sine))
        hidden = self._embed(tokens, token_before)
        asked: list[Tensor] = []
        caches: list[NewKv] = []
        read: list[Tensor] = []
        written: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            before = None if past is None else past[index // self.shape.layers_per_cache]
            normed = block.attention_norm(hidden)
            if block.attention.makes_kv:
                new = block.attention.new_kv(normed, angles, None if before is None else before.raw_key)
                caches.append(_rounded(new) if round_kv else new)
            queries = block.attention.queries(normed, angles)
            mixed = block.attention.attend(queries, caches[-1], before)
            hidden = block.mlp(hidden + mixed)
            asked.append(queries)
            if keep_hidden:
                read.append(normed)
                written.append(hidden)
        # A mixture of a few symbols needs large logits, or it leaks into all others; the gain must learn fast.
        logits = nnf.linear(self.norm(hidden), self.embedding.weight) * (SHARPNESS_RATE * self.sharpness).exp()
        return ForwardPass(logits, tuple(asked), tuple(caches), tuple(read), tuple(written))


def _rounded(new: NewKv) -> NewKv:
    keys, values = (part.to(torch.bfloat16).to(part.dtype) for part in (new.keys, new.values))
    return NewKv(keys, values, new.last_raw_key)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.normal_(module.bias, std=0.5)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.05)
