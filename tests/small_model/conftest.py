"""Models of a few weights, untrained unless a test says so."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the small model needs torch")
pytest.importorskip("safetensors", reason="weights are kept as safetensors")

from kvsim.quality.small_model.architecture import ARCHITECTURES, Shape, SmallTransformer  # noqa: E402


@pytest.fixture(scope="session", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> SmallTransformer:
    torch.manual_seed(5)
    made = SmallTransformer(Shape(request.param)).eval()
    for parameter in made.parameters():
        parameter.requires_grad_(requires_grad=False)
    return made
