"""Which parts of a strategy cannot go together, whatever the model: the composition rules.

Everything else composes: any encoding after any selection, any encoding after a reduction within a layer, a coding
after every encoding whose codes it takes. What depends on the model's shape is each part's ``check``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from kvsim.compression.base import KvEncoding, StrategyPart
from kvsim.compression.coding.base import Coding
from kvsim.compression.reduction.base import Reduction
from kvsim.compression.selection.base import TokenSelection


@dataclass(frozen=True)
class Parts:
    """The four parts of a strategy to be."""

    selection: TokenSelection
    reduction: Reduction
    encoding: KvEncoding
    coding: Coding


def conflict(selection: TokenSelection, reduction: Reduction, encoding: KvEncoding, coding: Coding) -> str | None:
    """Why these parts cannot be one strategy, or None: the first reason found, with what would go instead."""
    return next(conflicts(Parts(selection, reduction, encoding, coding)), None)


def conflicts(parts: Parts) -> Iterator[str]:
    """Every reason why these parts cannot be one strategy."""
    for rule in RULES:
        reason = rule(parts)
        if reason:
            yield reason


def _latents_keep_all_tokens(parts: Parts) -> str | None:
    """A latent vector that all heads read has no K and V per head to choose tokens by."""
    selection, reduction = parts.selection, parts.reduction
    if not reduction.is_replicated or selection.kind == "keep_all":
        return None
    return (
        f"{_name(selection)} chooses tokens by K and V per head, but {_name(reduction)} leaves one latent vector for "
        "all heads; it keeps all tokens"
    )


def _same_tokens_in_joined_layers(parts: Parts) -> str | None:
    """Layers that hold tokens for one another must hold the same tokens."""
    selection = parts.selection
    joining = next((part for part in (parts.reduction, parts.encoding) if part.joins_layers), None)
    if joining is None or not selection.evicts or selection.granularity == "none":
        return None
    return (
        f"{_name(joining)} stores tokens of several layers together, so these must hold the same ones, but "
        f"{_name(selection)} keeps other tokens in each layer and head; streaming_llm and quest go with it"
    )


def _bytes_known_before_calibration(parts: Parts) -> str | None:
    """Where data decides which layers store, or how much each of them keeps, each layer must store alike."""
    selection, reduction, encoding = parts.selection, parts.reduction, parts.encoding
    if not encoding.skips_boundary_layers:
        return None
    if selection.moves_budgets:
        return (
            f"{_name(selection)} finds in each prompt how much a layer keeps, and {_name(encoding)} keeps the first "
            f"and last {encoding.skips_boundary_layers} layers native, so bytes would depend on the data; take an "
            "encoding of equal layers, such as fp8, or h2o"
        )
    if not reduction.prices_mean_layer:
        return None
    return (
        f"{_name(reduction)} finds on calibration sequences which layers store, and {_name(encoding)} keeps the first "
        f"and last {encoding.skips_boundary_layers} layers native, so bytes would depend on the data; take an encoding "
        "of equal layers, such as fp8, or cla-2"
    )


def _reduction_that_encoding_takes(parts: Parts) -> str | None:
    """A whole codec is published for whole keys and values."""
    return None if parts.reduction.is_none else parts.encoding.refuses(parts.reduction)


def _keys_before_rope_keep_their_channels(parts: Parts) -> str | None:
    """What turned keys before they were projected or pruned cannot be undone after."""
    reduction, encoding = parts.reduction, parts.encoding
    if not encoding.undoes_rope or reduction.family not in _CHANGES_KEY_CHANNELS:
        return None
    return (
        f"{_name(encoding)} stores keys before RoPE turns them, but {_name(reduction)} leaves other channels than RoPE "
        "turned; quarot-4 and turboquant_mse go with it"
    )


def _one_part_evicts(parts: Parts) -> str | None:
    """An encoding that drops tokens has chosen them among all."""
    selection, encoding = parts.selection, parts.encoding
    if not encoding.evicts or selection.kind == "keep_all":
        return None
    return (
        f"{_name(encoding)} decides itself which tokens to keep and at how many bits, so {_name(selection)} cannot "
        "choose before it; take one of them"
    )


def _codes_that_can_be_coded(parts: Parts) -> str | None:
    """An entropy coder needs codes that it knows."""
    return parts.coding.refuses(parts.encoding)


RULES: Final[tuple[Callable[[Parts], str | None], ...]] = (
    _latents_keep_all_tokens,
    _same_tokens_in_joined_layers,
    _bytes_known_before_calibration,
    _reduction_that_encoding_takes,
    _keys_before_rope_keep_their_channels,
    _one_part_evicts,
    _codes_that_can_be_coded,
)
_CHANGES_KEY_CHANNELS: Final = ("low rank", "channel pruning")
"""Families of reductions after which a key has other channels than the model's."""


def _name(part: StrategyPart) -> str:
    return part.kind
