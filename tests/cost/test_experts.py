"""Mixture-of-experts layers against published timings of grouped products, and laws of how they are spread."""

from __future__ import annotations

import csv

import pytest
from cost_cases import SHARED_DATA
from hypothesis import given
from hypothesis import strategies as st

from kvsim.cost.estimator import price_gemm
from kvsim.cost.priors import Edge, load_priors
from kvsim.cost.rates import build_rates
from kvsim.cost.shapes import Gemm, forward_gemms
from kvsim.device_catalog import load_device
from kvsim.model_catalog import load_model
from kvsim.specs.base import Dtype

DEEPSEEK = (7168, 2048)
ACTIVE = (2, 4, 7, 10, 13, 21, 32)
"""Local experts that 1, 2, 4 ... 32 and 128 tokens touched (FlashInfer PR 4985)."""
B200_LAYER_US = {
    "bf16": (16.0, (51.2, 79.3, 117.8, 156.8, 192.5, 286.2, 398.3)),
    "mxfp8": (8.25, (38.2, 55.8, 79.2, 99.2, 120.4, 172.4, 234.7)),
    "nvfp4": (4.5, (25.9, 36.2, 50.1, 65.1, 75.0, 106.0, 143.6)),
}
"""One layer by TRT-LLM's kernels in FlashInfer on B200, routing to summing up (FlashInfer PR 5301, repeat 1)."""


def rates_of(device: str, edge: Edge = Edge.CENTRAL):
    return build_rates(load_device(device).spec, load_priors(), edge)


def layer_seconds(device: str, experts: int, weight_bits: float, edge: Edge = Edge.CENTRAL) -> float:
    """A layer whose tokens touch exactly so many experts: every one of them is chosen."""
    hidden, width = DEEPSEEK
    rates = rates_of(device, edge)
    products = (Gemm("up", hidden, 2 * width, 1, experts, experts), Gemm("down", width, hidden, 1, experts, experts))
    priced = (price_gemm(gemm, rates, weight_bits=weight_bits, compute=Dtype.BF16) for gemm in products)
    return rates.moe_layer_s + sum(float(one.seconds(1.0)) for one in priced)


@pytest.mark.parametrize("form", B200_LAYER_US)
def test_layers_on_b200_take_what_flashinfer_measured(form: str):
    bits, published = B200_LAYER_US[form]
    for experts, measured_us in zip(ACTIVE, published, strict=True):
        central = 1e6 * layer_seconds("b200-sxm", experts, bits)
        assert 1 / 1.35 <= central / measured_us <= 1.35
        low, high = (
            1e6 * layer_seconds("b200-sxm", experts, bits, edge) for edge in (Edge.OPTIMISTIC, Edge.PESSIMISTIC)
        )
        assert low <= 1.05 * measured_us
        assert measured_us <= high


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="measured data is not beside this checkout")
@pytest.mark.parametrize(("device", "tolerance"), [("h800", 0.06), ("h20", 0.25)])
def test_grouped_products_of_infersim(device: str, tolerance: float):
    """H20 has a tenth of the FLOPs per byte that tiles of 64 rows need: bandwidth alone would be twice too fast."""
    path = SHARED_DATA / "kernel_timings" / "infersim" / "grouped_gemm" / "decode" / device / "data.csv"
    rates = rates_of(device)
    errors = []
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows, local = int(row["tokens_per_expert"]), int(row["num_local_experts"])
            if not 4 <= rows <= 16:
                continue
            hidden, width = int(row["hidden_size"]), int(row["intermediate_size"])
            for name, k, n in (("up_proj_us", hidden, 2 * width), ("down_proj_us", width, hidden)):
                gemm = Gemm("experts", k, n, 1, local, local)
                priced = price_gemm(gemm, rates, weight_bits=8.0, compute=Dtype.FP8)
                errors.append(float(priced.seconds(float(rows))) * 1e6 / float(row[name]) - 1.0)
    errors.sort(key=abs)
    assert len(errors) > 20
    assert abs(errors[len(errors) // 2]) <= tolerance


@given(ranks=st.sampled_from((1, 2, 4, 8, 16)), rows=st.integers(1, 4000), data=st.sampled_from((1, 2, 8)))
def test_spread_experts_share_the_visits_and_the_matrices(ranks: int, rows: int, data: int):
    """Over all ranks, visits and touched matrices are those of one device that sees every rank's tokens."""
    model = load_model("qwen3-30b-a3b")
    (one, *_) = [gemm for gemm in forward_gemms(model, 1) if gemm.num_experts]
    (part, *_) = [
        gemm for gemm in forward_gemms(model, ranks, data_ranks=data, expert_parallel=True) if gemm.num_experts
    ]
    spread = ranks * data
    assert part.k == one.k
    assert part.n == one.n
    assert spread * part.visits_per_row == pytest.approx(data * one.visits_per_row)
    assert spread * float(part.matrices_touched(rows)) == pytest.approx(float(one.matrices_touched(rows * data)))
    (sliced, *_) = [gemm for gemm in forward_gemms(model, ranks, data_ranks=data) if gemm.num_experts]
    assert spread * sliced.n == pytest.approx(one.n, rel=0.02)


def test_an_uneven_load_costs_only_where_experts_lie_apart():
    rates = rates_of("h100-sxm")
    gemm = Gemm("experts", 4096, 3072, 1, 128, 8)
    spread = Gemm("experts", 4096, 3072, 1, 128, 8, local_experts=16, data_ranks=8)
    assert price_gemm(gemm, rates, weight_bits=16.0, compute=Dtype.BF16).skew == 1.0
    skewed = price_gemm(spread, rates, weight_bits=16.0, compute=Dtype.BF16)
    assert skewed.skew == rates.expert_imbalance > 1.0
    # No rank can touch more experts than it holds.
    held_s = 16 * skewed.weights_s
    assert float(skewed.seconds(32.0)) >= rates.grouped_launch_s + held_s * 0.5
    assert 16 * float(skewed.weights_s) == pytest.approx(held_s)
