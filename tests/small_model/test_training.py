"""Training follows its seed, reaches a criterion on what is easy, and says so where it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the small model needs torch")

from kvsim.errors import InvalidSpec  # noqa: E402
from kvsim.quality.small_model import weights  # noqa: E402
from kvsim.quality.small_model.architecture import Shape  # noqa: E402
from kvsim.quality.small_model.recipe import Recipe  # noqa: E402
from kvsim.quality.small_model.training import NotConverged, train  # noqa: E402

TINY = Shape("smeared", num_layers=2, width=64, num_heads=2, num_kv_heads=1, mlp_width=64)
SHORT = Recipe(contexts=(32,), tasks=("recall",), tokens_per_step=512, max_steps=3, decay_steps=1, check_every=1)


def _few_steps(seed: int) -> dict[str, torch.Tensor]:
    recipe = Recipe(**{**vars(SHORT), "criterion_exact": 0.0})
    return train(TINY, seed, recipe)[0].state_dict()


def test_equal_seeds_give_equal_weights() -> None:
    one, same, other = _few_steps(1), _few_steps(1), _few_steps(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_what_does_not_converge_is_refused() -> None:
    with pytest.raises(NotConverged, match="did not reach the criterion in 3 steps: recall"):
        train(TINY, 1, SHORT)


@pytest.mark.slow
def test_an_easy_task_is_learned_in_seconds() -> None:
    recipe = Recipe(
        contexts=(32,), tasks=("copy",), tokens_per_step=2048, max_steps=500, decay_steps=60, check_every=10,
        decay_at=0.95, criterion_exact=0.5,
    )  # fmt: skip
    _, log = train(TINY, 1, recipe)
    assert log.reached
    assert log.validation["copy"] >= 0.5
    assert log.steps < 500, "the learning rate fell because the task was learned, not because time ran out"


def _use(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(**{**vars(SHORT), "criterion_exact": 0.0})
    monkeypatch.setattr(weights, "RECIPE", recipe)


def test_weights_are_kept_with_their_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch)
    first = weights.load_or_train("smeared", 3, tmp_path)
    again = weights.load_or_train("smeared", 3, tmp_path)
    assert again.record == first.record == json.loads((tmp_path / "smeared-seed3.json").read_text())
    assert weights.weights_hash(again.model) == first.record["weights_sha256"]
    assert first.record["seed"] == 3


def test_other_weights_than_recorded_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch)
    weights.load_or_train("smeared", 3, tmp_path)
    record = json.loads((tmp_path / "smeared-seed3.json").read_text())
    (tmp_path / "smeared-seed3.json").write_text(json.dumps({**record, "weights_sha256": "0" * 64}))
    with pytest.raises(InvalidSpec, match="remove both to train anew"):
        weights.load_or_train("smeared", 3, tmp_path)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="plain, smeared"):
        Shape("plane")
