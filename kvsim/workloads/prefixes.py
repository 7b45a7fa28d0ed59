"""Prefix hashes: a whole number stands for a chunk of tokens and all that comes before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from kvsim.requests import IntArray

HASH_BLOCK_TOKENS: Final = 16
"""Chunk size of synthetic workloads: vLLM's default block size."""
_OWNER_STRIDE: Final = 2**32
"""Hash = owner * stride + position; an owner is a shared prefix or a session."""

Hashes = tuple[tuple[int, ...], ...]


def shared_hashes(choice: IntArray, shared_tokens: int, num_prefixes: int) -> Hashes:
    """Hashes of the whole chunks of each request's shared prefix; what follows is unique and stays unhashed."""
    positions = range(shared_tokens // HASH_BLOCK_TOKENS)
    prefixes = {owner: _chunks(owner, positions) for owner in range(num_prefixes)} if len(choice) else {}
    return tuple(prefixes[owner] for owner in choice.tolist())


def session_hashes(
    session: Sequence[int],
    prompt_tokens: Sequence[int],
    output_tokens: Sequence[int],
    choice: Sequence[int],
    shared_tokens: int,
    num_prefixes: int,
) -> tuple[Hashes, Hashes]:
    """Give hashes of each turn's prompt chunks, and of the chunks that its answer completes.

    Rows are turns in order of session, ``choice`` is per session. A chunk's hash depends on its session and position,
    or on the shared prefix where it lies wholly inside, so turn k+1 starts with turn k's hashes.
    """
    shared_chunks = shared_tokens // HASH_BLOCK_TOKENS
    prompts: list[tuple[int, ...]] = []
    answers: list[tuple[int, ...]] = []
    known: tuple[int, ...] = ()
    current = -1
    for row, owner in enumerate(session):
        if owner != current:
            current, known = owner, _chunks(choice[owner], range(shared_chunks))
        prompt_chunks = prompt_tokens[row] // HASH_BLOCK_TOKENS
        total_chunks = (prompt_tokens[row] + output_tokens[row] - 1) // HASH_BLOCK_TOKENS
        needed = max(prompt_chunks, total_chunks)
        known += _chunks(num_prefixes + owner, range(len(known), needed))
        prompts.append(known[:prompt_chunks])
        answers.append(known[prompt_chunks:total_chunks])
    return tuple(prompts), tuple(answers)


def chained_hashes(ids: Iterable[Sequence[int]], prompt_tokens: IntArray, block_tokens: int) -> Hashes:
    """Turn a trace's chunk ids into dense hashes of whole prefixes, whole chunks only.

    The id of a partly filled last chunk is left out, because engines share full blocks alone. Chaining each id to the
    one before makes equal hashes mean equal prefixes even where a trace hashes chunks by themselves.
    """
    known: dict[tuple[int, int], int] = {}
    rows = []
    for row, chunks in zip(ids, (prompt_tokens // block_tokens).tolist(), strict=True):
        previous = -1
        hashes = []
        for chunk in row[:chunks]:
            previous = known.setdefault((previous, chunk), len(known))
            hashes.append(previous)
        rows.append(tuple(hashes))
    return tuple(rows)


def _chunks(owner: int, positions: Iterable[int]) -> tuple[int, ...]:
    return tuple(owner * _OWNER_STRIDE + position for position in positions)
