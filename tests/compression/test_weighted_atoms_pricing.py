"""What weighted atoms cost: bytes, the buffer of the streaming form, and work."""

from __future__ import annotations

import pytest

from kvsim.compression import parse_compression, stored_bytes
from kvsim.compression.base import LayerView
from kvsim.compression.selection.weighted_atoms import WeightedAtoms
from kvsim.errors import InvalidSpec
from kvsim.model_catalog import load_model

MODEL = load_model("llama-3.1-8b")
LAYER = LayerView(0, 32, MODEL.groups[0])


def _selection(name: str) -> WeightedAtoms:
    selection = parse_compression(name).selection
    assert isinstance(selection, WeightedAtoms)
    return selection


def test_an_atom_is_a_token_and_four_bytes() -> None:
    """K (2 D e + 4) per KV head: 32 layers, 8 heads, D = 128, bf16."""
    assert stored_bytes(parse_compression("minimax:512"), MODEL, 4096, 0) == 32 * 8 * 512 * (2 * 128 * 2 + 4)
    assert stored_bytes(parse_compression("minimax:5000"), MODEL, 4096, 0) == 32 * 8 * 4096 * 2 * 128 * 2


def test_a_buffer_bounds_what_is_held() -> None:
    held = _selection("weighted_atoms(budget_tokens=512,buffer_tokens=128)").resident_tokens(4096, LAYER)
    assert [held(generated) for generated in (0, 1, 127, 128, 129, 5000)] == [512, 513, 639, 640, 640, 640]
    short = _selection("weighted_atoms(budget_tokens=512,buffer_tokens=128)")
    assert short.resident_tokens(100, LAYER)(5000) == 640
    weighed = short.scanned_tokens(100, LAYER)
    assert weighed is not None
    assert [weighed(generated) for generated in (0, 539, 540, 5000)] == [0, 0, 640, 640]


def test_compressing_again_is_spread_over_its_steps() -> None:
    calm, busy = (
        {call.name: call.work for call in _selection(name).decode_ops(LAYER, MODEL)}
        for name in ("weighted_atoms(budget_tokens=512,buffer_tokens=128)",
                     "weighted_atoms(budget_tokens=512,buffer_tokens=64)")
    )  # fmt: skip
    whole = {call.name: call.work for call in _selection("weighted_atoms:512").prefill_ops(640, LAYER, MODEL)}
    assert set(calm) == {f"re{name}" for name in whole}
    for name, work in whole.items():
        assert 128 * calm[f"re{name}"].flops == pytest.approx(work.flops)
        assert 128 * calm[f"re{name}"].launches == pytest.approx(work.launches)
    assert busy["reresponse_profiles"].flops > calm["reresponse_profiles"].flops
    assert not list(_selection("weighted_atoms:512").decode_ops(LAYER, MODEL))


def test_profiles_cost_two_flops_per_product() -> None:
    """64 queries of 32 heads meet 4,096 tokens: logits, outputs, norms, two sketches of 64; and V times 64 per head."""
    works = {call.name: call.work for call in _selection("minimax:512").prefill_ops(4096, LAYER, MODEL)}
    pairs = 64 * 32 * 4096
    assert works["response_profiles"].flops == 2 * pairs * (128 + 2 * 128 + 2 * 64) + 2 * 4096 * 8 * 128 * 64
    assert set(works) == {"response_profiles", "select_top_k", "cut_clusters", "merge_clusters"}


def test_drawn_queries_are_per_kv_head() -> None:
    seen, drawn = (
        next(iter(_selection(name).prefill_ops(4096, LAYER, MODEL))).work.vector_flops
        for name in ("minimax:512", "minimax(budget_tokens=512,queries=isotropic)")
    )
    assert seen == 4 * drawn
    assert _selection("minimax:512").query_aware
    assert not _selection("minimax(budget_tokens=512,queries=keys)").query_aware


def test_a_tree_of_blocks_compresses_more_entries() -> None:
    name = "minimax(budget_tokens=512,block_tokens=1024)"
    works = {call.name: call.work for call in _selection(name).prefill_ops(8192, LAYER, MODEL)}
    # 8 blocks, 7 joins of 2 x 512 entries.
    assert works["join_merge_clusters"].vector_flops == pytest.approx(
        7 / 8 * works["merge_clusters"].vector_flops, rel=0.2
    )
    one_block = _selection(name).prefill_ops(1000, LAYER, MODEL)
    assert not any(call.name.startswith("join") for call in one_block)


def test_a_buffer_needs_a_bound() -> None:
    with pytest.raises(InvalidSpec, match="give budget_tokens"):
        parse_compression("minimax(compression_ratio=0,buffer_tokens=64)")
