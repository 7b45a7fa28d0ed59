"""The front end's latency: what its tool fits to its half of the runs is what the priors hold."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest

from kvsim.cost.priors import load_priors

CHECKOUT = Path(__file__).resolve().parents[2]
DATA = CHECKOUT.parent / "shared" / "data"
sys.path.insert(0, str(CHECKOUT / "tools"))

from fit_front_end import FILE, fitted_seconds  # noqa: E402


@pytest.mark.skipif(not (DATA / FILE).is_file(), reason="public data are not beside the checkout")
def test_the_prior_is_what_the_tool_fits():
    prior = load_priors().request_overhead_s["vllm"]
    seconds = fitted_seconds(DATA)
    fitted = (statistics.median(seconds), min(seconds), max(seconds))
    # To the digit that the prior is written with.
    assert (prior.value, prior.low, prior.high) == pytest.approx(fitted, abs=0.06e-3), "run tools/fit_front_end.py"
