"""NSA and DSA: what is held and read, against the paper's table and against models that have an indexer."""

from __future__ import annotations

import numpy as np
import pytest

from kvsim.catalog import resolve
from kvsim.compression import parse_compression, stored_bytes
from kvsim.compression.base import LayerView
from kvsim.compression.selection.dsa import Dsa
from kvsim.compression.selection.quest import Quest
from kvsim.compression.selector import layer_view
from kvsim.cost.layer_bytes import layer_bytes_per_token
from kvsim.cost.priors import Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.sequence import SequenceModel
from kvsim.deployment import Deployment
from kvsim.errors import IncompatibleScenario, NotRunnable
from kvsim.model_catalog import load_model
from kvsim.scenario import Scenario
from kvsim.specs.model import LayerGroup, LayerKind
from kvsim.tensors import attend
from tests.quality.conftest import noise_cache

GROUP = LayerGroup(kind=LayerKind.FULL, layers=tuple(range(32)), num_kv_heads=8, k_head_dim=128, v_head_dim=128)
LAYER = LayerView(0, 32, GROUP)


# --- NSA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("context", "published"), [(8192, 2048), (16384, 2560), (32768, 3584), (65536, 5632)])
def test_nsa_reads_what_its_paper_counts(context: int, published: int) -> None:
    """Table 4 of arXiv 2502.11089: memory accesses of a decode step, in tokens."""
    nsa = parse_compression("nsa").selection
    own = GROUP.kv_elements_per_token * 2.0
    scanned = nsa.scanned_tokens(context, LAYER)
    assert scanned is not None
    moved = nsa.attended_tokens(context, LAYER)(0) * own + scanned(0) * nsa.scan_bytes_per_token(GROUP, 2.0)
    assert moved / own == published


def test_nsa_holds_a_sixteenth_more() -> None:
    model = load_model("llama-3.1-8b")
    native = stored_bytes(parse_compression("native"), model, 16_000, 0)
    assert stored_bytes(parse_compression("nsa"), model, 16_000, 0) == native * 17 / 16


@pytest.mark.parametrize("name", ["nsa", "dsa"])
def test_architectures_run_on_no_tensors(name: str) -> None:
    with pytest.raises(NotRunnable, match="must be trained with"):
        parse_compression(name).selection.selector()


# --- DSA ------------------------------------------------------------------------------------------------------------


def _deployment(model: str, strategy: str, device: str = "h200-sxm", ranks: int = 8) -> Deployment:
    return resolve(
        Scenario(model=model, device=device, workload="chat", compression=strategy, tensor_parallel_size=ranks)
    )


@pytest.mark.parametrize("encoding", ["native", "fp8"])
def test_deepseek_v3_with_dsa_is_v32_to_the_byte(encoding: str) -> None:
    strategy = "dsa" if encoding == "native" else f"dsa+{encoding}"
    ours, theirs = _deployment("deepseek-v3", strategy), _deployment("deepseek-v3.2", encoding)
    for one, other in zip(ours.layer_classes, theirs.layer_classes, strict=True):
        assert one.group == other.group
        assert (one.prefill_cap, one.decode_cap, one.rank_share) == (other.prefill_cap, other.decode_cap, 1.0)
        for (view, layers), (same, count) in zip(one.bands, other.bands, strict=True):
            assert layers == count
            assert layer_bytes_per_token(one, view, ours.model) == layer_bytes_per_token(other, same, theirs.model)
            assert layer_bytes_per_token(one, view, ours.model) == (656 if encoding == "fp8" else 1152) + 132
            for prompt in (1, 2047, 2048, 100_000):
                assert one.head_curves(prompt, view) == other.head_curves(prompt, same)
    rates = build_rates(ours.device, ours.priors, Edge.CENTRAL)
    for prompt in (100, 5000, 120_000):
        assert SequenceModel(ours, rates).profile(prompt) == SequenceModel(theirs, rates).profile(prompt)


def test_a_strategys_indexer_counts_and_a_models_own_does_not() -> None:
    v3, v32 = load_model("deepseek-v3"), load_model("deepseek-v3.2")
    own = stored_bytes(parse_compression("native"), v32, 1000, 0)
    assert stored_bytes(parse_compression("dsa"), v3, 1000, 0) == own + 61 * 132 * 1000
    assert stored_bytes(parse_compression("native"), v3, 1000, 0) == own


def test_dsa_states_of_a_layer_what_the_indexed_group_gives() -> None:
    dsa = parse_compression("dsa:512").selection
    group = dsa.trained_group(load_model("deepseek-v3").groups[0])
    assert (group.kind, group.index_topk, group.index_key_bytes) == (LayerKind.INDEXED, 512, 132)
    layer = LayerView(0, 61, group)
    assert [dsa.attended_tokens(prompt, layer)(3) for prompt in (1, 508, 509, 4096)] == [4, 511, 512, 512]
    assert dsa.resident_tokens(4096, layer)(3) == 4099
    assert dsa.trained_group(GROUP) is GROUP


@pytest.mark.parametrize(
    ("model", "strategy", "reason"),
    [
        ("llama-3.1-8b", "dsa", "nsa is for layers with K and V per head"),
        ("deepseek-v3.2", "dsa", "has an indexer of its own"),
        ("deepseek-v3", "nsa", "latent"),
        ("deepseek-v3", "dsa+nvfp4", "sparse|indexer|nvfp4"),
    ],
)
def test_models_that_cannot(model: str, strategy: str, reason: str) -> None:
    with pytest.raises(IncompatibleScenario, match=reason):
        _deployment(model, strategy, device="b200")


def test_the_baseline_of_dsa_is_the_model_without_it() -> None:
    from kvsim.analysis import uncompressed

    plain, own = uncompressed(_deployment("deepseek-v3", "dsa")), _deployment("deepseek-v3", "native")
    assert [one.group for one in plain.layer_classes] == [one.group for one in own.layer_classes]
    assert [one.selection for one in plain.layer_classes] == [one.selection for one in own.layer_classes]


def test_the_oracle_reads_more_mass_than_any_other_choice() -> None:
    kv = noise_cache(21, layers=1, tokens=320)
    layer, view = kv.layers[0], layer_view(kv, 0)
    oracle = Dsa(index_topk=64).read_mask(layer, view)
    quest = Quest(token_budget=64, num_dense_layers=0).read_mask(layer, view)
    assert oracle is not None
    assert quest is not None
    assert (oracle.sum(axis=2) == 64).all()
    weights = attend(layer, kv.attention_scale).weights
    of_oracle, of_quest = (np.where(mask, weights, 0).sum(axis=2) for mask in (oracle, quest))
    assert (of_oracle >= of_quest - 1e-6).all()
    for mask, row in zip(oracle.reshape(-1, 320), weights.reshape(-1, 320), strict=True):
        assert row[mask].min() >= row[~mask].max() - 1e-7
    assert Dsa().read_mask(layer, view) is None
