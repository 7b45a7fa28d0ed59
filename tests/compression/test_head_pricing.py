"""What heads of unequal length hold and read: curves per kind of head, pages of each head, masks, notes."""

from __future__ import annotations

import numpy as np
import pytest

from kvsim.catalog import resolve
from kvsim.compression import parse_compression, stored_bytes
from kvsim.compression.base import LayerView
from kvsim.cost.layer_bytes import head_length_bytes, page_table_bytes
from kvsim.cost.priors import Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.selection_notes import selection_notes
from kvsim.cost.sequence import SequenceModel
from kvsim.deployment import Deployment
from kvsim.scenario import Scenario
from kvsim.specs.model import LayerGroup, LayerKind, ModelSpec

GROUP = LayerGroup(kind=LayerKind.FULL, layers=tuple(range(32)), num_kv_heads=8, k_head_dim=128, v_head_dim=128)
LAYER = LayerView(3, 32, GROUP)
TOKEN_BYTES = 2 * 128 * 2
"""K and V of one head, bf16."""


def _deployed(name: str, **more: object) -> Deployment:
    scenario = {"model": "llama-3.1-8b", "device": "h100-sxm", "workload": "chat", "compression": name, **more}
    return resolve(Scenario.model_validate(scenario))


def _sequences(deployment: Deployment) -> SequenceModel:
    return SequenceModel(deployment, build_rates(deployment.device, deployment.priors, Edge.CENTRAL))


@pytest.mark.parametrize("prompt", [1, 300, 384, 385, 2000])
def test_duo_attention_holds_by_kind_of_head(prompt: int) -> None:
    curves = parse_compression("duo_attention:0.25").selection.head_curves(prompt, LAYER)
    assert [heads.share for heads in curves] == [0.75, 0.25]
    for generated in range(200):
        held = [heads.resident(generated) for heads in curves]
        assert held == [prompt + generated, min(prompt + generated, 384)]


def test_streaming_heads_are_counted_over_the_whole_model(models: dict[str, ModelSpec]) -> None:
    model = models["odd-heads"]
    held = stored_bytes(parse_compression("duo_attention:0.3"), model, 5000, 0)
    # Of 6 layers of 6 heads, round(10.8) stream.
    assert held == pytest.approx((25 * 5000 + 11 * 384) * 2 * 80 * 2)


@pytest.mark.parametrize("name", ["adakv:0.9", "duo_attention:0.9", "adakv:512"])
def test_masked_holds_and_reads_everything(name: str, models: dict[str, ModelSpec]) -> None:
    freed, masked = parse_compression(name), parse_compression(f"{name}(masked=true)")
    model = models["llama-3.1-8b"]
    native = stored_bytes(parse_compression("native"), model, 4000, 100)
    assert stored_bytes(masked, model, 4000, 100) == native > 2 * stored_bytes(freed, model, 4000, 100)
    assert masked.selection.masks
    assert not masked.selection.evicts
    names = [{call.name for call in one.selection.prefill_ops(4000, LAYER, model)} for one in (freed, masked)]
    assert names[0] - names[1] == {"compact_kv"}
    deployments = _deployed(name), _deployed(f"{name}(masked=true)"), _deployed("native")
    ticks = [_sequences(one).profile(4000).segments[0].ticks for one in deployments]
    # A cache that nothing is ever dropped from has one whole price per token, which rounds a little otherwise.
    assert ticks[0] < ticks[1] == pytest.approx(ticks[2], rel=1e-5)


def test_duo_attention_costs_what_its_heads_read() -> None:
    """A head that streams costs what a window of its size costs, to the rounding of a price."""
    mixed, whole, streaming = (
        _sequences(_deployed(f"duo_attention:{share}")).profile(8000) for share in (0.5, 0.0, 1.0)
    )
    mean = (whole.segments[0].ticks + streaming.segments[0].ticks) / 2
    # Tables of pages per head are read too: 4 of 8,192 bytes at 16 tokens.
    assert mixed.segments[0].ticks == pytest.approx(mean, rel=1e-3)


def test_pages_of_each_head_have_table_entries() -> None:
    ragged, equal, masked = (_deployed(name) for name in ("adakv", "snapkv", "adakv(masked=true)"))
    assert page_table_bytes(ragged.layer_classes[0], 16) == 4 * 8 / 16
    assert head_length_bytes(ragged.layer_classes[0]) == 4 * 8
    for deployment in (equal, masked):
        assert page_table_bytes(deployment.layer_classes[0], 16) == head_length_bytes(deployment.layer_classes[0]) == 0
    held = [_sequences(one).profile(4096).resident_bytes(0, 16) for one in (ragged, equal)]
    assert held[0] - held[1] == 32 * 8 * (4 * 2048 // 16 + 4)


@pytest.mark.parametrize("spread", [0, 40, 300])
def test_partly_filled_pages_of_each_head_cost_what_one_of_the_mean_does(spread: int) -> None:
    """Heads end anywhere in their last pages: (block - 1) / 2 tokens are empty per head, as of one that grows."""
    block, mean, growth = 16, 1000, 160
    rng = np.random.default_rng(spread)
    lengths = mean + rng.integers(-spread, spread + 1, 4096) if spread else np.full(4096, mean)
    steps = np.arange(growth)
    pages = np.ceil((lengths[:, None] + steps) / block).mean() * block
    priced = np.ceil((mean + steps) / block).mean() * block
    assert pages == pytest.approx(lengths.mean() + steps.mean() + (block - 1) / 2, abs=0.5)
    assert priced == pytest.approx(mean + steps.mean() + (block - 1) / 2, abs=0.5)


def test_notes_say_what_is_freed_and_what_is_masked() -> None:
    (freed,) = selection_notes(_deployed("adakv"))
    assert "frees tokens head by head" in freed
    assert "kvpress" in freed
    (masked,) = selection_notes(_deployed("adakv(masked=true)"))
    assert "no memory is freed" in masked
    assert "adakv_press.py" in masked
    assert selection_notes(_deployed("snapkv")) == selection_notes(_deployed("adakv:0")) == []


@pytest.mark.parametrize(
    ("name", "ranks", "bound"),
    [("adakv:1024", 2, "1.8"), ("adakv:1024", 4, "3.4"), ("adakv:0.25", 4, "1.33"), ("duo_attention", 8, "2")],
)
def test_the_fullest_rank_is_bounded(name: str, ranks: int, bound: str) -> None:
    notes = selection_notes(_deployed(name, tensor_parallel_size=ranks))
    assert f"can hold {bound} times the mean" in notes[1]


def test_bounds_hold_for_the_worst_scores() -> None:
    """One rank's heads take all that the safeguard of the others leaves."""
    heads, kept, safe, ranks = 8, 1000, 200, 4
    counts = np.array([safe] * 6 + [(heads * kept - 6 * safe) // 2] * 2)
    worst = counts.reshape(ranks, -1).sum(axis=1).max() / (counts.sum() / ranks)
    assert worst == pytest.approx(4 - 3 * 0.2)
