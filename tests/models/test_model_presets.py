"""Laws over every preset, and parameter counts against published ones."""

import json

import pytest

from kvsim.data_files import preset_dir
from kvsim.model_catalog import list_models, load_model
from kvsim.specs.base import Dtype
from kvsim.specs.model import LayerKind

PRESETS = list_models()

EXACT_PARAMETERS = {
    # "Model size" of the safetensors index on each Hugging Face model page, text model only.
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "deepseek-r1-distill-llama-8b": 8_030_261_248,
    "codellama-34b": 33_743_970_304,
    "yi-34b": 34_388_917_248,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
}

PUBLISHED_BILLIONS = {
    # Total and active parameters as the model card or technical report states them, and the tolerance it allows.
    "qwen3-30b-a3b": (30.5, 3.3, 0.02),
    "qwen3-235b-a22b": (235, 22, 0.01),
    "mixtral-8x7b": (46.7, 12.9, 0.01),
    "mixtral-8x22b": (141, 39, 0.01),
    "deepseek-v3": (671, 37, 0.02),
    "deepseek-v2-lite": (15.7, 2.66, 0.01),
    "jamba-v0.1": (52, 12, 0.01),
    "kimi-k2": (1026, 32.86, 0.01),
    "minimax-m2.5": (230, 11, 0.01),
    "llama-4-maverick": (400, 17, 0.02),
    "nemotron-3-nano-30b-a3b": (31.6, 3.6, 0.01),
    "gemma-4-26b-a4b": (25.2, 3.8, 0.01),
}


def test_there_are_enough_presets_of_current_models():
    assert len(PRESETS) >= 34
    wanted = {"llama-3.1-8b", "qwen3-30b-a3b", "gpt-oss-120b", "deepseek-v3.2", "gemma-3-27b", "qwen3-next-80b-a3b"}
    assert wanted <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_laws(name: str):
    model = load_model(name)
    layers = [layer for group in model.groups for layer in group.layers]
    assert sorted(layers) == list(range(model.num_layers))
    assert len(layers) == len(set(layers))
    assert 0 < model.num_active_parameters <= model.num_parameters
    assert (model.moe is None) == (model.num_active_parameters == model.num_parameters)
    assert 0 < model.num_embedding_parameters < model.num_parameters
    assert 0 < model.weight_bytes <= 2 * model.num_parameters
    assert model.kv_groups
    assert model.num_embedding_parameters == model.vocab_size * model.hidden_size * (2 - model.tie_word_embeddings)
    for group in model.groups:
        assert (group.window_tokens is not None) == (group.kind in (LayerKind.SLIDING, LayerKind.CHUNKED))
        assert (group.state_bytes > 0) == (group.kind is LayerKind.LINEAR)
        assert (group.kv_elements_per_token > 0) == (group.kind not in (LayerKind.LINEAR, LayerKind.MLP))
        assert group.is_latent == (model.mla is not None)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_names_its_origin(name: str):
    document = json.loads((preset_dir("models") / f"{name}.json").read_text())
    assert set(document) - {"generation"} == {"hub_id", "retrieved", "source", "config"}
    assert "/" in document["hub_id"]
    assert len(document["source"]) > 20
    assert document["hub_id"] in load_model(name).source
    assert name == name.lower()


def test_hub_ids_are_unique():
    ids = [json.loads(path.read_text())["hub_id"].lower() for path in preset_dir("models").glob("*.json")]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(("name", "parameters"), EXACT_PARAMETERS.items())
def test_parameter_count_is_the_published_one(name: str, parameters: int):
    assert load_model(name).num_parameters == parameters


@pytest.mark.parametrize(("name", "published"), PUBLISHED_BILLIONS.items())
def test_expert_models_near_the_published_counts(name: str, published: tuple[float, float, float]):
    total, active, tolerance = published
    model = load_model(name)
    assert model.num_parameters / 1e9 == pytest.approx(total, rel=0.01)
    assert model.num_active_parameters / 1e9 == pytest.approx(active, rel=tolerance)


@pytest.mark.parametrize(("name", "total", "active"), [("gpt-oss-120b", 116.83, 5.13), ("gpt-oss-20b", 20.91, 3.61)])
def test_gpt_oss_card_counts_the_head_but_not_the_input_embedding(name: str, total: float, active: float):
    # arXiv 2508.10925, table 1: active parameters leave the input embedding out.
    model = load_model(name)
    assert model.num_parameters / 1e9 == pytest.approx(total, rel=0.001)
    used = model.num_active_parameters - model.num_embedding_parameters / 2
    assert used / 1e9 == pytest.approx(active, rel=0.002)


def test_gpt_oss_weights_take_the_bytes_of_the_published_checkpoint():
    # hf-mem issue 60: 65,248,815,744 bytes of safetensors.
    assert load_model("gpt-oss-120b").weight_bytes == pytest.approx(65_248_815_744, rel=0.002)


def test_quantised_presets():
    deepseek = load_model("deepseek-v3")
    assert (deepseek.weight_dtype, deepseek.dtype) == (Dtype.FP8, Dtype.BF16)
    assert deepseek.weight_bytes == pytest.approx(671e9, rel=0.01)
    scout = load_model("llama-4-scout-fp8")
    assert scout.weight_dtype is Dtype.FP8
    assert load_model("llama-4-scout").num_parameters == scout.num_parameters
    assert 8 < scout.weight_bits < 8.5
    assert load_model("llama-3.1-8b").weight_bits == 16


def test_hybrids_keep_few_layers_of_kv():
    kv_layers = {name: sum(g.num_layers for g in load_model(name).kv_groups) for name in
                 ("qwen3-next-80b-a3b", "qwen3.5-27b", "nemotron-h-56b", "jamba-v0.1")}  # fmt: skip
    assert kv_layers == {"qwen3-next-80b-a3b": 12, "qwen3.5-27b": 16, "nemotron-h-56b": 10, "jamba-v0.1": 4}
