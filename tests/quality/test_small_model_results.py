"""From outcomes to tables: paired intervals, groups, and what is left out. No torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvsim.errors import InvalidSpec, UnknownName
from kvsim.quality.small_model.outcomes import Outcome, OutcomeFolder, Setting, settings_of
from kvsim.quality.small_model.points import small_model_points
from kvsim.quality.small_model.results import ResultRow, load_results, write_results
from kvsim.quality.small_model.summary import not_run, summarise
from kvsim.quality.small_model.tasks import TASKS

SEQUENCES = 200
MODELS = ("one", "two")


def _outcome(*, wrong: int = 0, kl: float = 0.0, bits: float = 16.0) -> Outcome:
    """The first ``wrong`` sequences miss the second question."""
    exact = np.ones((SEQUENCES, 2), dtype=np.float32)
    exact[:wrong, 1] = 0.0
    ones = np.ones(SEQUENCES, dtype=np.float32)
    return Outcome(exact, exact.mean(axis=1), exact.mean(axis=1), kl * ones, 0.5 * ones, bits)


def _folders(root: Path) -> dict[str, OutcomeFolder]:
    folders = {name: OutcomeFolder(root / name) for name in MODELS}
    for folder in folders.values():
        for task in TASKS:
            folder.write(Setting(task), "native", _outcome())
            folder.write(Setting(task), "kivi-2", _outcome(wrong=40, kl=0.25, bits=3.0))
            folder.write(Setting(task), "mxfp4", "not on this shape")
    return folders


def _rows(root: Path) -> dict[tuple[str, str, str], ResultRow]:
    return {
        (row.model, row.task, row.strategy): row for row in summarise(_folders(root), ("native", "kivi-2", "mxfp4"))
    }


def test_outcomes_come_back_from_disk(tmp_path: Path) -> None:
    folder = OutcomeFolder(tmp_path)
    before = _outcome(wrong=3, kl=0.123456, bits=3.25)
    folder.write(Setting("recall", sees_question=True), "snapkv:0.5", before)
    after = folder.read(Setting("recall", sees_question=True), "snapkv:0.5")
    assert isinstance(after, Outcome)
    assert np.array_equal(after.exact, before.exact)
    assert np.allclose(after.kl_nats, before.kl_nats)
    assert after.bits_per_element == 3.25
    assert folder.read(Setting("recall"), "snapkv:0.5") is None
    assert (Setting("recall", sees_question=True), "snapkv:0.5") not in set(folder.missing(["snapkv:0.5"]))


def test_selections_are_also_shown_the_question() -> None:
    assert len(settings_of("fp8")) == 5
    assert {setting.name for setting in settings_of("snapkv:0.5")} == {
        *TASKS, "recall-seen", "needle-seen", "chain-seen", "copy-seen",
    }  # fmt: skip


def test_a_row_holds_scores_questions_and_a_paired_interval(tmp_path: Path) -> None:
    row = _rows(tmp_path)["one", "recall", "kivi-2"]
    assert (row.score, row.uncompressed, row.first, row.second) == pytest.approx((0.9, 1.0, 1.0, 0.8))
    assert row.loss_low < row.loss < row.loss_high
    # 20 % of sequences lose half a point each: the standard error of the mean is 0.2 / sqrt(200).
    assert row.loss_high - row.loss_low == pytest.approx(2 * 1.96 * 0.2 / SEQUENCES**0.5, rel=0.15)
    assert row.kl_nats == row.kl_low == row.kl_high == pytest.approx(0.25)
    assert row.perplexity is None


def test_language_has_a_perplexity_and_no_exact_match(tmp_path: Path) -> None:
    row = _rows(tmp_path)["two", "language", "kivi-2"]
    assert row.perplexity == pytest.approx(np.exp(0.5))
    assert row.first is None
    assert row.score == row.top1_agreement


def test_all_models_and_tasks_together(tmp_path: Path) -> None:
    rows = _rows(tmp_path)
    assert rows["all", "all", "kivi-2"].score == pytest.approx(0.9)
    assert rows["all", "all", "kivi-2"].sequences == len(MODELS) * len(TASKS) * SEQUENCES
    assert rows["one", "all", "kivi-2"].score == pytest.approx(0.9)
    assert rows["all", "all", "native"].loss == 0
    assert rows["all", "recall", "native"].loss_low == rows["all", "recall", "native"].loss_high == 0


def test_what_did_not_run_has_a_reason_and_no_row(tmp_path: Path) -> None:
    assert not any(strategy == "mxfp4" for _, _, strategy in _rows(tmp_path))
    assert not_run(_folders(tmp_path), ("native", "mxfp4")) == {"mxfp4": "not on this shape"}


def test_a_mean_over_some_models_only_is_not_shown(tmp_path: Path) -> None:
    folders = _folders(tmp_path)
    folders["one"].write(Setting("recall"), "fp8", _outcome())
    rows = {(row.model, row.task) for row in summarise(folders, ("fp8",))}
    assert rows == {("one", "recall")}


def test_tables_come_back_from_disk(tmp_path: Path) -> None:
    rows = list(_rows(tmp_path / "outcomes").values())
    write_results(rows, {"caveat": "none"}, tmp_path)
    read = load_results(tmp_path)
    assert len(read.rows) == len(rows)
    assert read.models == MODELS
    assert read.rows[0].score == pytest.approx(rows[0].score, rel=1e-3)


def test_points_of_a_ranking(tmp_path: Path) -> None:
    write_results(_rows(tmp_path / "outcomes").values(), {}, tmp_path)
    points = {point.strategy: point for point in small_model_points(folder=tmp_path)}
    assert points["kivi-2"].risk == pytest.approx(0.25)
    assert points["kivi-2"].bits_per_element == 3.0
    with pytest.raises(UnknownName, match="unknown task 'recal'; did you mean 'recall'"):
        small_model_points(task="recal", folder=tmp_path)
    with pytest.raises(InvalidSpec, match="not measured on the small model: fp8"):
        small_model_points(("fp8",), folder=tmp_path)


def test_no_tables_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="write_small_model_results"):
        load_results(tmp_path / "none")
