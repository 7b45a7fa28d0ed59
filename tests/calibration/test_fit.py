"""Fits: parameters come back from made-up rows, folds keep shapes whole, errors come from unseen shapes."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from kvsim.calibration.build import choose_parts, split_parts
from kvsim.calibration.facts import DeviceFacts
from kvsim.calibration.fit import FOLDS, FittedLaw, cold_share, fit_law, fold_of, held_out_seconds, shape_of
from kvsim.calibration.laws import law_for
from kvsim.calibration.timings import HELD_OUT_BY, KEY_COLUMNS

FACTS = DeviceFacts("made-up", 2e12, 40e6, 3e14, {"bf16": 3e14}, 1.5e11, 3e11)
TRUE = {"launch_s": 5e-6, "stream_efficiency": 0.8, "matmul_efficiency": 0.6, "depth_s": 2e-7, "sharpness": 4.0}


def gemm_rows(noise: float = 0.0) -> pl.DataFrame:
    """GEMMs that follow the law."""
    sizes = [256, 1024, 4096, 16384]
    rows = [(m, n, k) for m in (1, 8, 64, 512, 4096) for n in sizes for k in sizes]
    frame = pl.DataFrame(rows, schema={"m": pl.Int64, "n": pl.Int64, "k": pl.Int64}, orient="row")
    key = dict.fromkeys(KEY_COLUMNS, "x") | {"operation": "gemm", "dtype": "bf16", "kv_dtype": ""}
    frame = frame.with_columns(pl.lit(value).alias(name) for name, value in key.items())
    seconds = FittedLaw(law_for("gemm"), key, FACTS, TRUE, None).seconds(shape_of(frame, "gemm"))
    spread = np.exp(np.random.default_rng(1).normal(0.0, noise, len(seconds)))
    return frame.with_columns(pl.Series("seconds", seconds * spread))


def decode_rows(slower_alone: float = 1.0) -> pl.DataFrame:
    """Decode attention whose ungrouped heads take `slower_alone` times as long."""
    heads = [(h, kv) for kv in (1, 2, 4, 8, 16, 32) for h in (kv, 2 * kv, 4 * kv, 8 * kv)]
    rows = [(b, c, h, kv, 128, 0) for b in (1, 8, 64) for c in (129, 1025, 8193) for h, kv in heads]
    names = ("batch", "context_tokens", "num_heads", "num_kv_heads", "head_dim", "window_tokens")
    frame = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.Int64), orient="row")
    key = dict.fromkeys(KEY_COLUMNS, "x") | {"operation": "decode_attention", "dtype": "bf16", "kv_dtype": "bf16"}
    frame = frame.with_columns(pl.lit(value).alias(name) for name, value in key.items())
    law = law_for("decode_attention")
    start = {p.name: p.start for p in law.parameters}
    seconds = FittedLaw(law, key, FACTS, start, None).seconds(shape_of(frame, law.operation))
    alone = (frame["num_heads"] == frame["num_kv_heads"]).to_numpy()
    return frame.with_columns(pl.Series("seconds", np.where(alone, slower_alone, 1.0) * seconds))


def test_parameters_come_back() -> None:
    fitted = fit_law(law_for("gemm"), gemm_rows(), FACTS)
    for name in ("launch_s", "stream_efficiency", "matmul_efficiency"):
        assert fitted.parameters[name] == pytest.approx(TRUE[name], rel=0.02)


def test_held_out_shapes_are_predicted() -> None:
    rows = gemm_rows(noise=0.01)
    ratio = held_out_seconds(law_for("gemm"), rows, FACTS) / rows["seconds"].to_numpy()
    assert np.median(np.abs(ratio - 1.0)) < 0.03


def test_outliers_do_not_move_the_rest() -> None:
    rows = gemm_rows().with_columns(
        seconds=pl.when(pl.int_range(pl.len()) % 20 == 7).then(10.0 * pl.col("seconds")).otherwise(pl.col("seconds"))
    )
    fitted = fit_law(law_for("gemm"), rows, FACTS)
    assert fitted.parameters["stream_efficiency"] == pytest.approx(TRUE["stream_efficiency"], rel=0.1)


def test_folds_keep_shapes_whole_and_are_even() -> None:
    rows = gemm_rows().with_columns(fold=pl.Series(fold_of(gemm_rows(), "gemm")))
    assert (rows.group_by(HELD_OUT_BY["gemm"]).agg(pl.col("fold").n_unique())["fold"] == 1).all()
    counts = rows.unique(HELD_OUT_BY["gemm"])["fold"].value_counts()["count"]
    assert len(counts) == FOLDS
    assert counts.max() - counts.min() <= 1


def test_folds_do_not_depend_on_the_order_of_rows() -> None:
    rows = gemm_rows()
    assert (fold_of(rows.reverse(), "gemm")[::-1] == fold_of(rows, "gemm")).all()


def test_both_domains_are_fitted_where_both_have_rows() -> None:
    rows = decode_rows()
    law = law_for("decode_attention")
    key = {name: str(rows[name][0]) for name in KEY_COLUMNS}
    share = cold_share(law, shape_of(rows, law.operation), key, FACTS)
    assert share.min() == 0.0
    assert share.max() == 1.0
    fitted = fit_law(law, rows, FACTS)
    assert fitted.cached is not None
    assert fitted.cached["per_sequence_s"] == fitted.parameters["per_sequence_s"]


def test_parts_hold_every_row_once() -> None:
    rows = decode_rows()
    few = rows.head(3).with_columns(pl.lit(64, dtype=pl.Int64).alias("head_dim"))
    parts = split_parts(law_for("decode_attention"), pl.concat([rows, few]))
    assert [selector for selector, _ in parts] == [{"head_dim": 128}]
    assert sum(len(part) for _, part in parts) == len(rows) + 3


@pytest.mark.parametrize(("slower_alone", "names"), [(1.0, {"head_dim"}), (1.8, {"head_dim", "is_grouped"})])
def test_another_kernel_for_ungrouped_heads_is_found(slower_alone: float, names: set[str]) -> None:
    parts, _ = choose_parts(law_for("decode_attention"), decode_rows(slower_alone), FACTS)
    assert set(parts[0][0]) == names
