"""What an ensemble promises, and the named ones."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import Final, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from kvsim.documents import validate
from kvsim.errors import InvalidSpec, UnknownName
from kvsim.specs.base import Spec

SLOW_ANGLE: Final = 0.3
"""Radians that a RoPE pair may turn over the whole sequence and still carry what a token means."""


class EnsembleSpec(Spec):
    """Statistics of a family of KV caches. Magnitudes are chosen, not measured, where no source is named.

    Content (what a token is about) lies in RoPE's slow channel pairs, and position in all of them, as observed in Gemma
    (arXiv 2410.06205). Scaling keys by channel and queries by the inverse leaves logits as they are, so heavy key
    channels are put in that way (the observation that SmoothAttention in QServe, arXiv 2405.04532, undoes).
    """

    num_layers: PositiveInt = 4
    num_kv_heads: PositiveInt = 2
    group_size: PositiveInt = 4
    """Query heads per KV head (GQA); they ask for different things."""
    head_dim: int = Field(128, ge=16, multiple_of=2)
    num_tokens: int = Field(1024, ge=64)
    num_queries: PositiveInt = 16
    """Queries right after the cached tokens."""
    num_prompt_queries: PositiveInt = 64
    """Queries of the last cached tokens."""
    rope_theta: PositiveFloat = 500_000.0

    num_sinks: NonNegativeInt = 4
    """First tokens that collect attention (arXiv 2309.17453 keeps 4)."""
    sink_mass: float = Field(0.5, ge=0.0, le=0.95)
    """Mean attention mass of the sinks together, over heads and queries (that one token can take most of it: arXiv
    2309.17453, 2410.10781)."""
    sink_value_scale: NonNegativeFloat = 0.1
    """Norm of a sink's value beside another token's: sinks store attention and add little (arXiv 2410.10781)."""

    heavy_channels: float = Field(0.0625, ge=0.0, lt=1.0)
    """Fraction of key channels, in RoPE pairs, that are heavy: few, fixed per head (arXiv 2402.02750, 2401.18079)."""
    heavy_channel_scale: float = Field(4.0, ge=1.0)
    """How much larger they are."""
    key_mean: NonNegativeFloat = 1.0
    """Root mean square of the key channels' means, beside that of their spread."""
    key_spectrum_exponent: NonNegativeFloat = 0.8
    """Eigenvalue i of the keys' covariance falls as i ** -exponent, before RoPE and without channel scales."""
    value_spectrum_exponent: NonNegativeFloat = 0.5
    """The same of values."""
    value_mean: NonNegativeFloat = 0.3
    """Root mean square of the value channels' means, beside that of their spread."""
    token_correlation: float = Field(0.3, ge=0.0, lt=1.0)
    """Correlation of neighbouring tokens (that they resemble each other: CacheGen, arXiv 2310.07240)."""
    layer_correlation: float = Field(0.5, ge=0.0, lt=1.0)
    """Correlation of a token's coordinates in neighbouring layers, in bases that differ (shared token subspaces: xKV,
    arXiv 2503.18893)."""

    attention_exponent: PositiveFloat = 1.0
    """Attention of a head that does not retrieve falls with a token's rank as rank ** -exponent, sinks apart."""
    recency_exponent: NonNegativeFloat = 0.4
    """Mean attention falls with distance as distance ** -exponent, through RoPE (power-law decay as assumed by arXiv
    2605.25085); below ``attention_exponent``, or it rules the ranks too."""
    num_topics: PositiveInt = 6
    """Subjects that a query may ask about; each has its own ranking of tokens, and a query head prefers some."""
    query_noise: NonNegativeFloat = 0.3
    """Standard deviation of logits for no reason."""

    retrieval_heads: float = Field(0.125, ge=0.0, le=1.0)
    """Fraction of KV heads whose queries look for needles (few heads do: arXiv 2404.15574, 2410.10819)."""
    num_needles: NonNegativeInt = 4
    """Marked tokens; queries look for them in turn."""
    needle_mass: float = Field(0.8, gt=0.0, lt=1.0)
    """Attention mass on the token looked for, of what sinks leave, in each retrieval head."""
    question_visible: bool = False
    """Whether the last quarter of the prompt's queries looks for needles too, so that a method may see the question."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_topics + self.num_needles + 1 > self.slow_channels:
            msg = (
                f"num_topics {self.num_topics} and num_needles {self.num_needles} need {self.num_topics} + "
                f"{self.num_needles} + 1 channels that RoPE hardly turns over {self.total_tokens} tokens, but only "
                f"{self.slow_channels} of head_dim {self.head_dim} do at rope_theta {self.rope_theta:g}; raise "
                "rope_theta or head_dim, or take fewer tokens, topics or needles"
            )
            raise ValueError(msg)
        if self.num_tokens < 4 * (self.num_sinks + self.num_needles):
            msg = f"num_tokens {self.num_tokens} leaves too few beside num_sinks and num_needles (a quarter at most)"
            raise ValueError(msg)
        if self.num_prompt_queries > self.num_tokens:
            msg = f"num_prompt_queries {self.num_prompt_queries} are more than num_tokens {self.num_tokens}"
            raise ValueError(msg)
        return self

    @property
    def total_tokens(self) -> int:
        """Positions in all, queries to come included."""
        return self.num_tokens + self.num_queries

    @property
    def slow_channels(self) -> int:
        """Channels that turn by at most SLOW_ANGLE over all positions."""
        half = self.head_dim // 2
        angles = (self.rope_theta ** (-pair / half) * self.total_tokens for pair in range(half))
        return 2 * sum(1 for angle in angles if angle <= SLOW_ANGLE)

    @property
    def heavy_pairs(self) -> int:
        """Heavy RoPE pairs of a head."""
        return round(self.heavy_channels * self.head_dim / 2)


PRESETS: Final = MappingProxyType(
    {
        "llama-like": EnsembleSpec(),
        "heavy-keys": EnsembleSpec(heavy_channel_scale=16.0, key_mean=2.0),
        "retrieval": EnsembleSpec(retrieval_heads=0.5, num_needles=8),
        "diffuse": EnsembleSpec(
            sink_mass=0.05, attention_exponent=0.4, recency_exponent=0.2, retrieval_heads=0.0, num_needles=0
        ),
    }
)
"""Everyday mixture; outlier channels as strong as reported for some models; exact look-up; attention spread thin."""

_SPELLING: Final = re.compile(r"\s*([\w-]+)\s*(?:\(([^()]*)\))?\s*(?::\s*(\d+))?\s*")


def preset(name: str, **changes: object) -> EnsembleSpec:
    """Give a named ensemble with some fields changed.

    Raises
    ------
    UnknownName, InvalidSpec
        No preset has that name; a field is unknown or wrong.
    """
    if name not in PRESETS:
        raise UnknownName(kind="ensemble", name=name, known=PRESETS)
    return validate(EnsembleSpec, PRESETS[name].model_dump() | changes, f"ensemble {name!r}")


def parse_ensemble(text: str) -> tuple[EnsembleSpec, int]:
    """Read ``name``, ``name:seed`` or ``name(field=value,...):seed``; the seed is 0 unless given.

    Raises
    ------
    UnknownName, InvalidSpec
    """
    match = _SPELLING.fullmatch(text)
    if match is None:
        msg = f"ensemble {text!r} is not NAME, NAME:SEED or NAME(field=value,...):SEED; names: {', '.join(PRESETS)}"
        raise InvalidSpec(msg)
    name, fields, seed = match.groups()
    changes: dict[str, object] = {}
    for item in filter(None, (piece.strip() for piece in (fields or "").split(","))):
        field, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals or not value or field in changes:
            msg = f"ensemble {text!r}: {item!r} is not a new field=value"
            raise InvalidSpec(msg)
        changes[field] = value
    return preset(name, **changes), int(seed or 0)
