"""What each method charges for its own work."""

from __future__ import annotations

import pytest

from kvsim.compression import parse_compression
from kvsim.compression.base import LayerView
from kvsim.ops import Work
from kvsim.specs.model import ModelSpec

FAMILIES = {
    "native": None, "fp8": "fp8", "fp8_e5m2": "fp8", "fp8_per_token_head": "fp8_per_token_head",
    "int8_per_token_head": "int8_per_token_head", "int4_per_token_head": "int4_per_token_head", "nvfp4": "nvfp4",
    "mxfp4": "mxfp4", "kivi-4": "kivi_4", "kivi-2": "kivi_2", "turboquant_k8v4": "turboquant_k8v4",
    "turboquant_4bit_nc": "turboquant_4bit", "turboquant_k3v4_nc": "turboquant_k3v4",
    "turboquant_3bit_nc": "turboquant_3bit", "low_rank": None, "q8_0": "ggml_q8_0", "q4_0": "ggml_q4_0",
    "q5_1": "ggml_q5_1", "q8_0/q4_0": "ggml_q4_0",
    "q8_0(key_type=f16,value_type=f16)": None, "kv_adaquant": "kv_adaquant",
}  # fmt: skip


@pytest.fixture
def llama(models: dict[str, ModelSpec]) -> ModelSpec:
    return models["llama-3.1-8b"]


@pytest.fixture
def layer(llama: ModelSpec) -> LayerView:
    return LayerView(7, llama.num_layers, llama.groups[0])


def _prefill(name: str, prompt: int, layer: LayerView, model: ModelSpec) -> dict[str, Work]:
    return {call.name: call.work for call in parse_compression(name).selection.prefill_ops(prompt, layer, model)}


@pytest.mark.parametrize(("name", "family"), FAMILIES.items())
def test_unpack_families(name: str, family: str | None) -> None:
    assert parse_compression(name).stored.unpack_family == family


def test_quantising_reads_native_and_writes_the_format(llama: ModelSpec) -> None:
    (call,) = parse_compression("nvfp4").stored.append_ops(llama.groups[0], llama)
    assert (call.work.bytes_read, call.work.bytes_written) == (4096, 1152)


def test_turboquant_rotates_only_quantised_keys_and_the_query(llama: ModelSpec) -> None:
    group = llama.groups[0]
    rotated, plain = (parse_compression(f"turboquant_{name}").encoding for name in ("3bit_nc", "k8v4"))
    assert [call.name for call in rotated.append_ops(group, llama)] == ["rotate_keys", "quantize_kv"]
    (query,) = rotated.decode_ops(group, llama)
    assert query.work.flops == 2 * 128 * 128 * 32
    assert [call.name for call in plain.append_ops(group, llama)] == ["quantize_kv"]
    assert tuple(plain.decode_ops(group, llama)) == ()


def test_int4_per_token_head_turns_query_and_output(llama: ModelSpec) -> None:
    calls = tuple(parse_compression("int4_per_token_head").stored.decode_ops(llama.groups[0], llama))
    assert sum(float(call.work.flops) for call in calls) == 4 * 128 * 128 * 32


def test_llama_cpp_turns_keys_by_the_head_and_values_by_sixty_fours(llama: ModelSpec) -> None:
    group = llama.groups[0]
    both = parse_compression("q8_0/q4_0").stored
    assert [call.name for call in both.append_ops(group, llama)] == ["rotate_keys", "rotate_values", "quantize_kv"]
    query, output = both.decode_ops(group, llama)
    assert query.work.flops == 2 * 128 * 128 * 32
    assert output.work.flops == 2 * 64 * 128 * 32
    (query,) = parse_compression("q8_0(value_type=f16)").stored.decode_ops(group, llama)
    assert query.name == "rotate_query"
    plain = parse_compression("q4_0(hadamard=false)").stored
    assert tuple(plain.decode_ops(group, llama)) == ()
    odd = group.model_copy(update={"k_head_dim": 96, "v_head_dim": 96})
    assert tuple(both.decode_ops(odd, llama)) == ()


def test_low_rank_rebuilds_keys_per_attended_token(llama: ModelSpec) -> None:
    encoding = parse_compression("low_rank(retained_fraction=0.25)").stored
    # rank 0.25 * 4 * 128 = 128 = head_dim, so the weighted sum is no wider than plain attention's
    assert encoding.attention_flops_per_token(llama.groups[0], llama) == 2 * 128 * 128 * 8
    wide = parse_compression("low_rank").stored.attention_flops_per_token(llama.groups[0], llama)
    assert wide == 2 * 256 * 128 * 8 + 2 * 32 * (256 - 128)


def test_snapkv_scores_once_with_its_window(layer: LayerView, llama: ModelSpec) -> None:
    work = _prefill("snapkv:0.5", 8192, layer, llama)
    assert list(work) == ["score_with_window", "pool_scores", "select_top_k", "compact_kv"]
    assert work["score_with_window"].flops == 2 * 64 * 8192 * 128 * 32
    assert work["compact_kv"].bytes_read == 4096 * 4096
    assert _prefill("snapkv:0.5", 60, layer, llama) == {}


def test_h2o_pays_for_the_whole_attention_matrix_and_every_step(layer: LayerView, llama: ModelSpec) -> None:
    work = _prefill("h2o:1024", 8192, layer, llama)
    assert work["accumulate_attention"].flops == 8192 * 8192 * 128 * 32
    ratio = float(work["accumulate_attention"].flops) / float(
        _prefill("snapkv", 8192, layer, llama)["score_with_window"].flops
    )
    assert ratio == 8192 / (2 * 64)
    assert list(_prefill("h2o:1024", 500, layer, llama)) == ["accumulate_attention"]
    selection = parse_compression("h2o:1024").selection
    assert selection.decode_score_flops_per_token(layer.group, llama) == 32 + 8
    assert [call.name for call in selection.decode_ops(layer, llama)] == ["replace_lightest_token"]


def test_tova_takes_the_newest_query_to_all_keys_in_every_step(layer: LayerView, llama: ModelSpec) -> None:
    work = _prefill("tova:1024", 8192, layer, llama)
    assert list(work) == ["score_with_newest_query", "select_top_k", "compact_kv"]
    assert work["score_with_newest_query"].flops == 2 * 8192 * 128 * 32
    selection = parse_compression("tova:1024").selection
    step = selection.decode_score_work(layer.group, llama)
    assert step is not None
    # Per attended token: the methods' 2 D Hq, and the keys of its KV heads once more.
    assert (step.flops, step.bytes_read) == (2 * 128 * 32, 8 * 128 * 2)
    assert [call.name for call in selection.decode_ops(layer, llama)] == ["replace_lightest_token"]


@pytest.mark.parametrize("name", ["knorm", "keydiff", "qfilter", "lagkv", "cur", "random", "expected_attention"])
def test_scores_of_the_prompt_cost_nothing_in_decode(name: str, layer: LayerView, llama: ModelSpec) -> None:
    selection = parse_compression(name).selection
    assert list(_prefill(name, 8192, layer, llama))[-2:] == ["select_top_k", "compact_kv"]
    assert tuple(selection.decode_ops(layer, llama)) == ()
    assert selection.decode_score_flops_per_token(layer.group, llama) == 0.0
    assert selection.decode_score_work(layer.group, llama) is None


def test_scores_of_keys_alone_read_the_keys(layer: LayerView, llama: ModelSpec) -> None:
    keys_bytes = 8192 * 8 * 128 * 2
    for name, operation, passes, flops in (
        ("knorm", "score_keys", 1, 2), ("qfilter", "score_keys", 1, 2), ("keydiff", "score_key_directions", 2, 8),
    ):  # fmt: skip
        work = _prefill(name, 8192, layer, llama)[operation]
        assert work.bytes_read == passes * keys_bytes
        assert work.vector_flops == flops * 8192 * 8 * 128
        assert work.flops == 0.0


def test_expected_attention_pays_per_query_head(layer: LayerView, llama: ModelSpec) -> None:
    work = _prefill("expected_attention", 8192, layer, llama)
    assert work["query_statistics"].flops == 2 * 8192 * 128**2 * 32
    # A covariance per query head: products with it and with the mean, and the row-wise product with the key.
    assert work["score_expected_attention"].flops == 2 * 8192 * 128 * (128 + 2) * 32
    plain = _prefill("expected_attention(use_covariance=false)", 8192, layer, llama)
    assert plain["query_statistics"].flops == 0.0
    assert plain["score_expected_attention"].flops == 2 * 8192 * 128 * 32


def test_chunkkv_pays_its_scorer_and_ranks_chunks(layer: LayerView, llama: ModelSpec) -> None:
    work, alone = _prefill("chunkkv:0.5", 8000, layer, llama), _prefill("snapkv:0.5", 8000, layer, llama)
    assert list(work) == ["score_with_window", "pool_scores", "average_chunks", "select_top_k", "compact_kv"]
    assert work["score_with_window"] == alone["score_with_window"]
    assert work["compact_kv"] == alone["compact_kv"]
    assert 160 * work["select_top_k"].bytes_read == alone["select_top_k"].bytes_read
    other = _prefill("chunkkv:0.5(scorer=knorm)", 8000, layer, llama)
    assert other["score_keys"] == _prefill("knorm", 8000, layer, llama)["score_keys"]


def test_streaming_llm_scores_nothing(layer: LayerView, llama: ModelSpec) -> None:
    selection = parse_compression("streaming_llm").selection
    assert tuple(selection.prefill_ops(8192, layer, llama)) == ()
    assert tuple(selection.decode_ops(layer, llama)) == ()


def test_quest_builds_and_scans_page_bounds(layer: LayerView, llama: ModelSpec) -> None:
    selection = parse_compression("quest").selection
    bounds = _prefill("quest", 8192, layer, llama)["page_bounds"]
    assert bounds.bytes_written == 8192 * selection.scan_bytes_per_token(layer.group, 2.0)
    assert selection.scan_flops_per_token(layer.group, llama) == 4 * 32 * 128 / 16
    assert [call.name for call in selection.decode_ops(layer, llama)] == ["update_page_bounds", "select_pages"]
    dense = LayerView(1, llama.num_layers, llama.groups[0])
    assert tuple(selection.decode_ops(dense, llama)) == ()
    assert tuple(selection.prefill_ops(8192, dense, llama)) == ()


def test_append_work_is_linear_in_tokens(llama: ModelSpec) -> None:
    # No shared matrix is charged per token: a token's bytes are its own vectors, in and out.
    for name in ("turboquant_4bit_nc", "int4_per_token_head", "low_rank"):
        for call in parse_compression(name).stored.append_ops(llama.groups[0], llama):
            assert float(call.work.bytes_read) <= 4096
