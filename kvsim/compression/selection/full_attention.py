"""What selections on full-attention layers share, and the budget of those that compress a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field, PositiveInt, model_validator

from kvsim.compression.selection.base import TokenSelection, acts_on
from kvsim.errors import InvalidSpec
from kvsim.specs.base import DTYPE_BITS
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec

DEFAULT_COMPRESSION_RATIO = 0.5
"""What a bare name such as ``snapkv`` stands for: half of the prompt removed."""


class FullAttentionSelection(TokenSelection):
    """A selection that needs full-attention layers with K and V per head."""

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        if any(acts_on(group) for group in model.groups):
            return None
        kinds = ", ".join(sorted({"latent (MLA)" if group.is_latent else group.kind.value for group in model.groups}))
        return f"{self.kind} acts on full-attention layers with K and V per head, but {model.name} has only: {kinds}"


class BudgetedSelection(FullAttentionSelection):
    """A selection sized by a share of the prompt or by a number of tokens."""

    inline_fields: ClassVar[tuple[str, ...]] = ("compression_ratio", "budget_tokens")

    compression_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Fraction of the prompt's KV removed (kvpress's meaning)."""
    budget_tokens: PositiveInt | None = None
    """Tokens kept per layer (on average over layers, where a method shares them out)."""

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.compression_ratio is None) == (self.budget_tokens is None):
            msg = "give exactly one of compression_ratio and budget_tokens"
            raise ValueError(msg)
        return self

    def budget(self, prompt_tokens: int) -> int:
        """Tokens kept of a prompt, at most all of them; a share is rounded down (as kvpress does)."""
        if self.compression_ratio is not None:
            return int(prompt_tokens * (1.0 - self.compression_ratio))
        return min(prompt_tokens, self.budget_tokens or prompt_tokens)

    @property
    def evicts(self) -> bool:
        return self.compression_ratio != 0.0

    @property
    def granularity(self) -> str:
        # Each KV head keeps tokens of its own, but all heads of a layer equally many.
        return "head"

    @classmethod
    def inline_parameters(cls, text: str, given: Mapping[str, object]) -> dict[str, object]:
        """``snapkv:0.5`` is a compression_ratio, ``snapkv:1024`` a budget_tokens."""
        if text.isdecimal() and int(text) > 0:
            return {"budget_tokens": int(text)}
        return {"compression_ratio": text}

    def inline_text(self) -> str | None:
        return str(self.compression_ratio if self.budget_tokens is None else self.budget_tokens)


def whole_tokens(name: str, text: str) -> int:
    """Parse the token count after ``name:``; raise InvalidSpec naming what is allowed."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    msg = f"{name!r} takes a whole number of tokens after ':', such as '{name}:1024' (got {text!r})"
    raise InvalidSpec(msg)


def kv_heads(group: LayerGroup) -> int:
    """KV heads whose tokens a layer scores and stores; none where it reads another layer's cache."""
    return 0 if group.shares_kv else group.num_kv_heads


def native_token_bytes(group: LayerGroup, model: ModelSpec) -> float:
    """Bytes of one token's K and V in one layer, as the model makes them."""
    return group.kv_elements_per_token * DTYPE_BITS[model.dtype] / 8
