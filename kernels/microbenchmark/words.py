"""Plain runs of 32-bit words, the inputs of the bandwidth microbenchmarks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..contract import Comparison, Variant
from ..launches import LaunchConfig

CHUNK_WORDS = 1 << 15
"""Words that one program moves: 128 KiB, so that a program's start weighs nothing."""
WORD_BYTES = 4
_INT32 = torch.iinfo(torch.int32)


@dataclass(frozen=True)
class WordsCase:
    """A number of 32-bit words."""

    name: str
    num_words: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the words."""
        return self.num_words * WORD_BYTES


CORRECTNESS_CASES = tuple(
    WordsCase(name, num_words)
    for name, num_words in (
        ("one-word", 1),
        ("odd", 1021),
        ("one-chunk", CHUNK_WORDS),
        ("chunks-and-a-tail", 3 * CHUNK_WORDS + 77),
    )
)
TIMING_CASES = tuple(WordsCase(f"{mib}MiB", (mib << 20) // WORD_BYTES) for mib in (64, 128, 256, 512, 1024, 2048, 8192))


def random_words(num_words: int, *, seed: int, device: str) -> torch.Tensor:
    """Draw int32 words from their whole range."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randint(_INT32.min, _INT32.max, (num_words,), generator=generator, dtype=torch.int32, device=device)


class WordsVariant(Variant):
    """What the bandwidth microbenchmarks share. Input: ``source``, int32."""

    cost_unit = "byte"
    correctness_cases: tuple[Any, ...] = CORRECTNESS_CASES
    timing_cases: tuple[Any, ...] = TIMING_CASES
    compile_case: Any = WordsCase("16MiB", 1 << 22)

    def make_inputs(self, case: WordsCase, *, seed: int, device: str) -> dict[str, Any]:
        return {"source": random_words(case.num_words, seed=seed, device=device)}

    def configs(self, target: str, case: WordsCase) -> tuple[LaunchConfig, ...]:
        # One 16-byte load per lane and tile, eight to thirty-two of them in flight.
        return (
            LaunchConfig(block_n=4096, num_warps=8, num_stages=1),
            LaunchConfig(block_n=2048, num_warps=4, num_stages=1),
            LaunchConfig(block_n=1024, num_warps=4, num_stages=1),
        )

    def comparison(self, result: str) -> Comparison:
        return "exact"

    def compute_dtype(self, case: WordsCase) -> str:
        return "float32"

    def check_source(self, case: WordsCase, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Give the source; raise ValueError unless it is the case's."""
        source = inputs["source"]
        if source.dtype != torch.int32 or source.shape != (case.num_words,) or not source.is_contiguous():
            raise ValueError("source must be contiguous int32, (num_words,)")
        return source
