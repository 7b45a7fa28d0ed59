"""Compare a variant with its reference: fresh random inputs, poisoned outputs, one tolerance per dtype."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..contract import Variant
from ..launches import LaunchConfig

TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2, "fp8": 8e-2}
"""Largest error as a share of the largest expected value: a few roundings of the dtype that the maths runs in."""
CODE_MISMATCHES = 2e-3
"""Share of code bytes that may differ: a value midway between two codes falls to either side by one rounding."""


class CheckFailed(AssertionError):
    """A variant does not agree with its reference."""


@dataclass(frozen=True)
class Outcome:
    """How far one result was from its reference: an error as a share of the tolerance that it was held to."""

    result: str
    comparison: str
    error: float
    tolerance: float


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let `torch.empty` give NaN (integers: the largest value), so that what is read unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        if not torch.empty(3).isnan().all():
            raise CheckFailed("torch does not fill fresh memory, so unwritten results would not show")
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run(variant: Variant, case: Any, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
    """Allocate poisoned buffers, launch, and give the buffers."""
    with poisoned_memory():
        buffers = variant.allocate(case, inputs, config)
    for launch in variant.plan(case, inputs, buffers, config):
        launch.run()
    return buffers


def check(variant: Variant, case: Any, *, seed: int, device: str, config: LaunchConfig) -> list[Outcome]:
    """Run a case and compare every result; raise CheckFailed where one is out of tolerance."""
    inputs = variant.make_inputs(case, seed=seed, device=device)
    expected = variant.reference(case, inputs)
    buffers = run(variant, case, inputs, config)
    outcomes = [compare(variant, case, name, buffers[name], expected[name]) for name in expected]
    for outcome in outcomes:
        if not outcome.error <= outcome.tolerance:
            raise CheckFailed(
                f"{variant.name}, case {case.name}: {outcome.result} differs from the reference by {outcome.error:.3g} "
                f"({outcome.comparison}; allowed {outcome.tolerance:.3g})"
            )
    return outcomes


def compare(variant: Variant, case: Any, name: str, actual: torch.Tensor, expected: torch.Tensor) -> Outcome:
    """Give the error of one result; NaN where only one of the two is NaN."""
    kind = variant.comparison(name)
    if actual.shape != expected.shape:
        raise CheckFailed(f"{variant.name}, {name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if kind == "close":
        wanted, found = expected.double(), actual.double()
        scale = wanted[wanted.isfinite()].abs().amax().item() if wanted.isfinite().any() else 0.0
        both = (wanted == found) | (wanted.isnan() & found.isnan())
        difference = torch.where(both, 0.0, (wanted - found).abs())
        error = difference.amax().item() / (scale or 1.0) if difference.numel() else 0.0
        return Outcome(name, kind, error, TOLERANCES[variant.compute_dtype(case)])
    if actual.dtype != expected.dtype:
        raise CheckFailed(f"{variant.name}, {name}: dtype {actual.dtype}, expected {expected.dtype}")
    differing = actual.contiguous().view(torch.uint8) != expected.contiguous().view(torch.uint8)
    share = differing.double().mean().item() if differing.numel() else 0.0
    return Outcome(name, kind, share, CODE_MISMATCHES if kind == "codes" else 0.0)
