"""What a reader of a report must know of tokens that are dropped head by head, or merely masked."""

from __future__ import annotations

from collections.abc import Iterator

from kvsim.compression.selection.base import TokenSelection
from kvsim.compression.selection.ragged import HeadwiseSelection
from kvsim.compression.spelling import spell_part
from kvsim.deployment import Deployment
from kvsim.specs.prior import Prior


def selection_notes(deployment: Deployment) -> list[str]:
    """Notes on each selection that serves requests here."""
    classes = [layer_class for one in deployment.variants for layer_class in one.layer_classes]
    selections = dict.fromkeys(one.selection for one in classes if one.selection is not None)
    return [note for selection in selections for note in _notes(selection, deployment.tensor_parallel_size)]


def _notes(selection: TokenSelection, ranks: int) -> Iterator[str]:
    if selection.expected_share is not None:
        yield _expected(spell_part(selection), selection.expected_share)
    if selection.masks:
        yield _masked(selection)
    elif selection.granularity == "ragged" and selection.evicts:
        yield _freed(selection)
        if ranks > 1 and isinstance(selection, HeadwiseSelection):
            yield _uneven(selection, ranks)


def _expected(name: str, share: Prior) -> str:
    band = f"{share.low:.3g} to {share.high:.3g} are possible, and no band of this report spans them"
    if share.low == share.high:
        band = "and its spread is not known"
    return (
        f"how many tokens {name} keeps depends on the data: {share.value:.3g} of those older than its window are "
        f"taken, {band} ({share.source})"
    )


def _masked(selection: TokenSelection) -> str:
    whose = f", as in {selection.masked_in}" if selection.masked_in else ""
    return (
        f"{selection.kind} is simulated masked{whose}: tokens that are not kept are hidden, no memory is freed, and "
        "every step reads all tokens"
    )


def _freed(selection: TokenSelection) -> str:
    masked = f"; {selection.masked_in} only masks, which masked=true simulates" if selection.masked_in else ""
    return (
        f"{selection.kind} frees tokens head by head: priced with pages and block tables per KV head, and attention at "
        f"the rate of equal heads (kernels/decode_attention/ragged_heads, compiled and not timed){masked}"
    )


def _uneven(selection: HeadwiseSelection, ranks: int) -> str:
    return (
        f"{selection.kind} on {ranks} ranks: heads hold different numbers of tokens, and ranks are priced as if they "
        f"held equally many; a step waits for the fullest rank, which can hold {selection.fullest_rank(ranks):.3g} "
        "times the mean of a layer at most"
    )
