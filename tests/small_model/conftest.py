"""Models that nobody trained, unless a test says so. Tests are skipped where torch is not installed."""

from __future__ import annotations

from typing import Any

import pytest

ARCHITECTURES = ("plain", "smeared", "smeared-cla2")


@pytest.fixture(scope="session", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Any:
    import torch

    from kvsim.quality.small_model.architecture import Shape, SmallTransformer

    torch.manual_seed(5)
    made = SmallTransformer(Shape(request.param)).eval()
    for parameter in made.parameters():
        parameter.requires_grad_(requires_grad=False)
    return made
