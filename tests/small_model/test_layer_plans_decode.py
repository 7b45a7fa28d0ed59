"""Layer plans while decoding: cuts are each layer's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the small model needs torch (extra capture)")

from kvsim.compression import parse_compression  # noqa: E402
from kvsim.quality.small_model.decode_phase import Schedule, decode_with, decode_without_cuts  # noqa: E402
from kvsim.quality.small_model.tasks import generate  # noqa: E402

SCHEDULE = Schedule(prompt_tokens=16, interval=16)


def _batch() -> Any:
    return generate("recall", np.random.default_rng(1), 2, 64, 1)


@pytest.mark.parametrize("name", ["h2o:24", "decoding:24(decoding=keydiff,compression_interval=16)"])
def test_one_policy_everywhere_decodes_as_that_policy(model: Any, name: str) -> None:
    plan = parse_compression(f"layer_plan[{model.shape.num_caches}*{name}]").selection
    found, wanted = (decode_with(model, _batch(), SCHEDULE, one) for one in (plan, parse_compression(name).selection))
    assert torch.equal(found.logits, wanted.logits)
    assert found.held_share == wanted.held_share


def test_layers_that_keep_all_are_left_alone(model: Any) -> None:
    caches = model.shape.num_caches
    whole = parse_compression(f"layer_plan[{caches}*keep_all]").selection
    run = decode_with(model, _batch(), SCHEDULE, whole)
    assert run.held_share == 1.0
    reference = decode_without_cuts(model, _batch(), SCHEDULE)
    torch.testing.assert_close(run.logits, reference.logits, rtol=1e-3, atol=1e-3)
    last = parse_compression(f"layer_plan[{caches - 1}*keep_all;streaming_llm:16]").selection
    assert 1 - 1 / caches < decode_with(model, _batch(), SCHEDULE, last).held_share < 1.0
