"""docs/accuracy-tables.md: written by its tool, for the calibration set that is shipped."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from kvsim.data_files import data_dir
from kvsim.validation import SUITES
from kvsim.validation.suite import Result, Score, Skipped

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT / "tools"))

from write_accuracy import HASH_LINE, PAGE, TARGETS, UNSEEN_TARGETS, Target, render, set_hash  # noqa: E402

GOOD, BAD = Score(100, 0.01, 0.05, 0.002), Score(100, 0.31, 0.95, -0.2)


def results(score: Score) -> dict[str, Result]:
    metrics = {"kernel-timings": "decode_attention", "edge": "decode_tok_s"}
    found = {}
    for suite in SUITES:
        scores = {metrics.get(suite, "ttft_mean"): score}
        groups = {"domain=cold": scores, "device=h100-sxm": scores, "bound by=bandwidth": scores}
        found[suite] = Result(suite, 100, (Skipped("made up", 7),), groups, scores)
    return found


def test_the_page_is_of_the_shipped_set():
    if not (data_dir("calibration/sets") / "default.yaml").is_file():
        pytest.skip("no calibration set is shipped in this checkout")
    text = PAGE.read_text(encoding="utf-8")
    assert HASH_LINE.format(set_hash()) in text, "the set has moved on: run tools/write_accuracy.py ../shared/data"


def test_every_suite_has_a_section_and_counts_what_it_left_out():
    text = render(results(GOOD), {"l40s": results(GOOD)["kernel-timings"], "h20": "no transfer"}, "ab" * 32)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["All suites", *SUITES, "Devices treated as never seen"]
    assert text.count("100 rows scored. Left out: made up (7).") == len(SUITES)
    assert HASH_LINE.format("ab" * 32) in text
    assert "h20 could not be predicted: no transfer." in text


def test_targets_are_said_to_be_met_or_missed():
    met = render(results(GOOD), {"l40s": results(GOOD)["kernel-timings"]}, "ab" * 32)
    missed = render(results(BAD), {"l40s": results(BAD)["kernel-timings"]}, "ab" * 32)
    assert "median ≤ 4% met, p90 ≤ 12% met" in met
    assert "median ≤ 12% met" in met
    assert Target(correct=0.9).verdict(Score(14, None, None, None, correct=0.86)) == "≥ 90% right missed"
    assert "missed" not in met.partition("## All suites")[2]
    assert "median ≤ 4% missed, p90 ≤ 12% missed" in missed
    assert Target(0.04).verdict(Score(1, None, None, None, correct=1.0)) == ""


def test_targets_are_the_issue_s():
    kernels, serving = TARGETS["kernel-timings"], TARGETS["vllm-serving"]
    assert kernels["decode_attention"] == Target(0.04, 0.12)
    assert [kernels[name].median for name in ("prefill_attention", "gemm", "all_reduce")] == [0.07, 0.06, 0.12]
    assert {name: target.median for name, target in serving.items()} == {
        "itl_mean": 0.05, "e2e_mean": 0.05, "ttft_mean": 0.12, "e2e_p99": 0.10, "ttft_p99": 0.25, "kv_blocks": 0.01,
    }  # fmt: skip
    assert TARGETS["vllm-requests"] == serving
    assert TARGETS["engine-tables"] == {"tpot": Target(0.08), "ttft": Target(0.20)}
    assert TARGETS["kv-quant"] == {"ratio": Target(0.12), "direction": Target(correct=0.90)}
    assert (UNSEEN_TARGETS["bandwidth"].median, UNSEEN_TARGETS["arithmetic"].median) == (0.12, 0.25)


def test_no_number_of_a_page_is_typed():
    """Every figure of the page comes from a result: other results give other figures everywhere."""
    good, bad = (render(results(one), {}, "ab" * 32) for one in (GOOD, BAD))
    shown = {line for line in good.splitlines() if line.startswith("| ") and "%" in line}
    assert shown
    assert not shown & set(bad.splitlines())
