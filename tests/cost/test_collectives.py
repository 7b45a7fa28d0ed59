"""What ranks exchange: measured collectives, laws, and topology."""

from __future__ import annotations

import pytest
from cost_cases import SHARED_DATA, deploy, step_model
from hypothesis import given
from hypothesis import strategies as st

from kvsim.cost.collectives import all_reduce_seconds, collective_seconds, gather_seconds
from kvsim.cost.priors import Edge, load_priors
from kvsim.cost.rates import build_rates
from kvsim.device_catalog import load_device

NCCL = {"h100-sxm": ("h100_sxm", "2.29.2"), "b200-sxm": ("b200_sxm", "2.29.2"), "l40s": ("l40s", "2.27.3")}
HALF_BYTES = 2


def rates_of(device: str, edge: Edge = Edge.CENTRAL):
    return build_rates(load_device(device).spec, load_priors(), edge)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="measured data is not beside this checkout")
@pytest.mark.parametrize("device", NCCL)
@pytest.mark.parametrize("operation", ["all_gather", "reduce_scatter"])
def test_gathers_lie_within_the_band_of_nccl(device: str, operation: str):
    """Sizes that serving sends, and large ones: four in five of all within the priors' band and a fifth."""
    pl = pytest.importorskip("polars")
    folder, version = NCCL[device]
    table = pl.read_parquet(SHARED_DATA / "kernel_timings" / folder / "comm" / "nccl" / version / "nccl_perf.parquet")
    table = table.filter((pl.col("op_name") == operation) & (pl.col("nccl_dtype") == "half"))
    low, high = rates_of(device, Edge.OPTIMISTIC), rates_of(device, Edge.PESSIMISTIC)
    inside = []
    for ranks, size, latency_ms in table.select("num_gpus", "message_size", "latency").iter_rows():
        fast, slow = (float(gather_seconds(size * HALF_BYTES, ranks, rates)) * 1e3 for rates in (low, high))
        inside.append(fast / 1.2 <= latency_ms <= slow * 1.2)
    assert len(inside) > 50
    assert sum(inside) >= 0.8 * len(inside)


@given(
    ranks=st.sampled_from((1, 2, 4, 8, 16, 64)), size=st.floats(0, 1e9), device=st.sampled_from(("h100-sxm", "l40s")),
)  # fmt: skip
def test_collectives_rise_with_size_and_an_all_reduce_is_two_passes(ranks: int, size: float, device: str):
    rates = rates_of(device)
    here = all_reduce_seconds(size, ranks, rates)
    assert all_reduce_seconds(1.1 * size, ranks, rates) >= here
    assert here >= gather_seconds(size, ranks, rates) - rates.gather_latency_s
    if ranks == 1:
        assert here == 0.0
    once, twice = (
        collective_seconds(size, ranks, rates, passes=passes, latency_s=0.0)
        - collective_seconds(0.0, ranks, rates, passes=passes, latency_s=0.0)
        for passes in (1.0, 2.0)
    )
    assert twice == pytest.approx(2 * once)


def test_more_nodes_are_slower_than_one_and_a_rack_of_links_is_not_two_nodes():
    near, far = (float(all_reduce_seconds(1e7, ranks, rates_of("h100-sxm"))) for ranks in (8, 16))
    assert far > near
    rack = load_device("gb200").spec
    if rack.scale_up_domain is not None:
        assert rates_of("gb200").domain_devices == rack.scale_up_domain.value > 8


def test_logits_are_gathered_over_tensor_parallel_ranks_alone():
    one, four = (step_model(deploy("llama-3.3-70b", "h100-sxm", tensor_parallel_size=ranks)) for ranks in (1, 4))
    assert one.gather_seconds(64) == 0.0
    gathered = 64 * 128_256 * 2
    link = rates_of("h100-sxm").link_bytes_per_s
    assert four.gather_seconds(64) == pytest.approx(rates_of("h100-sxm").gather_latency_s + 0.75 * gathered / link)
    assert four.gather_seconds(0) == 0.0
