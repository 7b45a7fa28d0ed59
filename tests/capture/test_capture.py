"""What is captured is what the model attends to: its outputs and its distributions follow from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="capturing needs torch (extra capture)")
transformers = pytest.importorskip("transformers", reason="capturing needs transformers (extra capture)")

from kvsim.compression import parse_compression  # noqa: E402
from kvsim.errors import IncompatibleScenario, InvalidSpec  # noqa: E402
from kvsim.quality.capture import Captured, capture, check_family, encode_text, load_model  # noqa: E402
from kvsim.quality.capture_signals import Requests  # noqa: E402
from kvsim.quality.continuation import continue_with  # noqa: E402
from kvsim.quality.store import StoredCache, fit_strategy, store_cache  # noqa: E402
from kvsim.tensors import KvTensors, attend  # noqa: E402
from kvsim.tensors.files import read_kv, write_kv  # noqa: E402

TOKENS, QUERIES, WINDOW = 48, 5, 8
UNKNOWN = "[UNK]"
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def _config(family: str) -> object:
    if family == "llama3-rope":
        return transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE)
    kinds = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}
    kinds["mistral"] = transformers.MistralConfig
    extra = {"head_dim": 32} if family == "qwen3" else {"sliding_window": None} if family == "mistral" else {}
    return kinds[family](**SIZES, **extra)


def _model(family: str) -> object:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(_config(family)).eval()
    for parameter in model.parameters():
        # Initial weights are so small that attention is uniform and everything agrees.
        if parameter.ndim == 2:
            parameter.data *= 6.0
    return model


def _ids(seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 97, TOKENS + QUERIES).tolist()


@pytest.fixture(scope="module", params=["llama", "llama3-rope", "mistral", "qwen2", "qwen3"])
def case(request: pytest.FixtureRequest) -> tuple[object, Captured, list[np.ndarray]]:
    model = _model(request.param)
    outputs: list[np.ndarray] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given: outputs.append(given[0][0].numpy().copy()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(torch.tensor([_ids()]))
    for hook in hooks:
        hook.remove()
    return model, capture(model, _ids(), num_queries=QUERIES, num_prompt_queries=WINDOW, source="tiny"), outputs


def test_captured_tensors_reproduce_the_models_attention(case: tuple[object, Captured, list[np.ndarray]]) -> None:
    _, captured, outputs = case
    for layer, output in zip(captured.kv.layers, outputs, strict=True):
        times = np.arange(TOKENS - WINDOW, TOKENS)
        mask = np.broadcast_to(np.arange(TOKENS) <= times[:, None], (4, WINDOW, TOKENS)).copy()
        asked = type(layer)(layer.keys, layer.values, layer.positions, layer.prompt_queries, layer.prompt_queries)
        found = attend(asked, captured.kv.attention_scale, mask).outputs
        expected = output[times].reshape(WINDOW, 4, -1).transpose(1, 0, 2)
        assert np.abs(expected).max() > 0.05
        assert found == pytest.approx(expected, abs=2e-5)


def test_rope_is_the_models_own(case: tuple[object, Captured, list[np.ndarray]]) -> None:
    """Undone, the first token's turn is none, and equal tokens in the first layer have equal keys."""
    model, captured, _ = case
    rope, layer = captured.kv.rope, captured.kv.layers[0]
    assert rope is not None
    plain = rope.undo(layer.keys, layer.positions)
    ids = np.array(_ids()[:TOKENS])
    repeated = [np.flatnonzero(ids == token) for token in np.unique(ids) if (ids == token).sum() > 1]
    assert repeated
    for places in repeated:
        assert plain[:, places[0]] == pytest.approx(plain[:, places[1]], abs=1e-3)
        assert np.abs(layer.keys[:, places[0]] - layer.keys[:, places[1]]).max() > 0.05
    if getattr(model.config, "rope_parameters", {}).get("rope_type") == "llama3":
        slow = 500000.0 ** -(np.arange(8) / 8)
        assert rope.inverse_frequencies[-1] == pytest.approx(slow[-1] / 8, rel=1e-5)
        assert rope.inverse_frequencies[0] == pytest.approx(1.0)


def test_the_uncompressed_cache_put_back_changes_nothing(case: tuple[object, Captured, list[np.ndarray]]) -> None:
    model, captured, _ = case
    native = parse_compression("native")
    stored = store_cache(fit_strategy(native), captured.kv)
    risk = continue_with(model, captured, native, stored)
    assert len(risk.kl) == QUERIES
    assert max(risk.kl) < 1e-6
    assert risk.top1_agreement == 1.0


def test_a_damaged_cache_changes_what_comes_next(case: tuple[object, Captured, list[np.ndarray]]) -> None:
    model, captured, _ = case
    kept = np.broadcast_to(np.arange(TOKENS - 8, TOKENS), (2, 8)).copy()
    layers = tuple(layer.take(kept[:, index:]) for index, layer in enumerate(captured.kv.layers))
    damaged = StoredCache(type(captured.kv)(layers, None, captured.kv.attention_scale, "cut"), (None,) * 3, (0.0,) * 3)
    risk = continue_with(model, captured, parse_compression("native"), damaged)
    assert risk.mean_kl > 1e-3


def test_real_strategies_change_it_more_the_less_they_store(case: tuple[object, Captured, list[np.ndarray]]) -> None:
    model, captured, _ = case
    kl = {}
    for name in (
        "turboquant_mse:4",
        "turboquant_mse:2",
        "streaming_llm:40",
        "streaming_llm:8",
        "quest:16",
        "pyramidkv(budget_tokens=16,window_size=8)",
    ):
        compression = parse_compression(name)
        stored = store_cache(fit_strategy(compression), captured.kv)
        kl[name] = continue_with(model, captured, compression, stored).mean_kl
    assert 0 < kl["turboquant_mse:4"] < kl["turboquant_mse:2"]
    assert 0 < kl["streaming_llm:40"] < kl["streaming_llm:8"]
    assert kl["quest:16"] > 1e-4
    assert kl["pyramidkv(budget_tokens=16,window_size=8)"] > 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_signals_are_what_the_model_did(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states give the values back; a second reading in one chunk is the second half of a doubled text."""
    model, prompt = _model(family), _ids()[:TOKENS]
    taken = _with_signals(model)
    double = capture(model, [*prompt, 7, *prompt, 1], num_queries=1, num_prompt_queries=TOKENS, source="tiny").kv
    assert taken.signals.hidden is not None
    assert taken.signals.repeat_queries is not None
    assert taken.signals.repeat_keys is not None
    for index, layer in enumerate(taken.layers):
        values = model.model.layers[index].self_attn.v_proj(torch.from_numpy(taken.signals.hidden[index]))
        heads = values.detach().unflatten(-1, (2, -1)).transpose(0, 1).numpy()
        assert heads == pytest.approx(layer.values, abs=1e-4)
        twice = double.layers[index]
        assert taken.signals.repeat_queries[index] == pytest.approx(twice.prompt_queries, abs=1e-4)
        assert taken.signals.repeat_keys[index] == pytest.approx(twice.keys[:, TOKENS + 1 :], abs=1e-4)
    monkeypatch.setattr("kvsim.quality.capture_signals.REPEAT_CHUNK", 20)
    chunked = _with_signals(model).signals
    assert chunked.repeat_queries is not None
    for one, other in zip(chunked.repeat_queries, taken.signals.repeat_queries, strict=True):
        assert one.shape == other.shape
        assert one[:, :20] == pytest.approx(other[:, :20], abs=1e-4)
        assert (one[:, 20:] != other[:, 20:]).any()


def _with_signals(model: object) -> KvTensors:
    return capture(
        model, _ids(), num_queries=QUERIES, num_prompt_queries=WINDOW, source="tiny",
        signals=("hidden", "repeat_queries"), requests=Requests((7,), (8,)),
    ).kv  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_entropy_and_distance_follow_from_what_the_model_puts_out(family: str, tmp_path: Path) -> None:
    """The model's own list of hidden states has every layer's output but the last one's, which comes normed."""
    model = _model(family)
    kv = capture(
        model, _ids(), num_queries=QUERIES, num_prompt_queries=WINDOW, source="tiny", signals=("entropy", "distance")
    ).kv
    with torch.no_grad():
        out = model(torch.tensor([_ids()]), output_hidden_states=True)
    probabilities = torch.softmax(out.logits[0, :TOKENS].double(), dim=-1)
    # Fewer than 256 symbols: all are candidates.
    assert kv.signals.entropy == pytest.approx(-(probabilities * probabilities.log()).sum(dim=-1).numpy(), abs=1e-4)
    assert kv.signals.distance is not None
    assert kv.signals.distance.shape == (3, TOKENS)
    first, second = (state[0, :TOKENS].double() for state in out.hidden_states[1:3])
    assert kv.signals.distance[2] == pytest.approx(np.zeros(TOKENS), abs=1e-6)
    norm, last = model.model.norm, out.hidden_states[3][0, :TOKENS].double()
    bare = last / norm.weight.detach().double()
    for found, state in zip(kv.signals.distance, (first, second), strict=False):
        cosine = torch.cosine_similarity(state, bare, dim=-1).numpy()
        assert found == pytest.approx(1 - cosine, abs=1e-4)
    path = tmp_path / "kv.safetensors"
    write_kv(kv, path)
    again = read_kv(path, ("entropy", "distance")).signals
    assert np.array_equal(again.entropy, kv.signals.entropy)
    assert np.array_equal(again.distance, kv.signals.distance)
    kept = store_cache(fit_strategy(parse_compression("infokv(budget_tokens=16,window_size=8)")), kv).kv
    assert [layer.num_tokens for layer in kept.layers] == [16] * 3


def test_a_second_reading_must_fit_the_context() -> None:
    with pytest.raises(InvalidSpec, match="takes 180 positions, more than the model's context of 128"):
        capture(
            _model("llama"), [1] * 91, num_queries=1, num_prompt_queries=0, source="tiny", signals=("repeat_queries",)
        )


def test_the_model_attends_as_before_afterwards(case: tuple[object, Captured, list[np.ndarray]]) -> None:
    model, captured, _ = case
    with torch.no_grad():
        logits = model(torch.tensor([_ids()])).logits[0, TOKENS:]
    again = torch.log_softmax(logits, dim=-1).numpy()
    assert again == pytest.approx(captured.log_probabilities, abs=1e-4)
    assert captured.kv.native_bits == 32


def test_what_cannot_be_captured_is_refused() -> None:
    with pytest.raises(IncompatibleScenario, match="'gpt2' cannot be captured; families that can: llama"):
        check_family(transformers.GPT2Config(), "gpt2")
    model = _model("llama")
    with pytest.raises(InvalidSpec, match="200 tokens are more than the model's context of 128"):
        capture(model, [1] * 200, num_queries=1, num_prompt_queries=0, source="tiny")
    with pytest.raises(InvalidSpec, match="no more prompt queries than prompt tokens"):
        capture(model, [1] * 20, num_queries=1, num_prompt_queries=20, source="tiny")
    model = transformers.AutoModelForCausalLM.from_config(transformers.MistralConfig(**SIZES, sliding_window=16))
    with pytest.raises(IncompatibleScenario, match="a window of 16 tokens"):
        capture(model, [1] * 20, num_queries=1, num_prompt_queries=2, source="tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of one token per character, as `save_pretrained` writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("tiny")
    _model("llama").to(torch.bfloat16).save_pretrained(path)
    letters = {chr(32 + index): index for index in range(95)} | {"\n": 95, UNKNOWN: 96}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN).save_pretrained(path)
    (path / "text.txt").write_text("The quick brown fox jumps over the lazy dog, and again. " * 2, encoding="utf-8")
    return path


def test_the_command_captures_and_runs(folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from kvsim.cli import build_app

    out, invoke = tmp_path / "kv.safetensors", CliRunner().invoke
    source = ["--model", str(folder), "--text", str(folder / "text.txt"), "--tokens", "64", "--queries", "4"]
    result = invoke(build_app(), ["quality", "capture", *source, "--prompt-queries", "8", "-o", str(out)])
    assert result.exit_code == 0, result.output
    kv = read_kv(out)
    assert (kv.num_layers, kv.layers[0].num_tokens, kv.native_bits) == (3, 64, 16)
    assert kv.layers[0].queries.shape == (4, 4, 16)
    assert kv.layers[0].prompt_queries.shape == (4, 8, 16)
    assert folder.name in kv.source
    result = invoke(build_app(), ["quality", "run", *source, "-s", "native", "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["strategies"]
    assert row["model"]["mean_kl_nats"] < 1e-3
    assert row["model"]["tokens"] == 4
    result = invoke(build_app(), ["quality", "run", "--kv", str(out), "-s", "native"])
    assert result.exit_code == 0, result.output
    more = ["--signals", "hidden,repeat_queries", "-o", str(out)]
    source[5] = "40"
    result = invoke(build_app(), ["quality", "capture", *source, *more])
    assert result.exit_code == 0, result.output
    assert read_kv(out, ("hidden",)).signals.hidden is not None
    learned = ["-s", "kvzip:0.5,kvzap_linear:0.5(window_size=8)", "--calibrate", str(out), "--json"]
    for tensors in (source, ["--kv", str(out)]):
        result = invoke(build_app(), ["quality", "run", *tensors, *learned])
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout)["strategies"]
        assert all(row["bits_per_element"] < 15 for row in rows), rows
    result = invoke(build_app(), ["quality", "capture", *source, "--signals", "hiden", "-o", str(out)])
    assert result.exit_code != 0
    assert "hidden" in result.output


def test_a_layer_plan_is_made_by_what_the_model_says_next(folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from kvsim.cli import build_app
    from kvsim.compression.plan_file import load_plan

    other = tmp_path / "other.txt"
    other.write_text("Pack my box with five dozen liquor jugs. " * 3, encoding="utf-8")
    out = tmp_path / "plan.yaml"
    source = ["--model", str(folder), "--text", str(folder / "text.txt"), "--test", str(other), "--tokens", "64"]
    flags = ["--queries", "4", "--prompt-queries", "64", "-c", "h2o,streaming_llm", "--keep", "0.5", "-o", str(out)]
    result = CliRunner().invoke(build_app(), ["quality", "plan", *source, *flags, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert "final-logit KL" in document["source"]
    assert document["held_out_harm"] > 0
    assert len(document["layers"]) == 3
    assert parse_compression(document["strategy"]) == parse_compression(load_plan(out).strategy)
    ran = CliRunner().invoke(
        build_app(), ["quality", "run", *source[:4], *source[6:], *flags[:4], "-s", str(out), "--json"]
    )
    (row,) = json.loads(ran.stdout)["strategies"]
    assert row["model"]["mean_kl_nats"] == pytest.approx(document["calibration_harm"], rel=1e-6)


def test_wrong_input_of_the_command_is_named(folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from kvsim.cli import build_app

    def fails(*options: str) -> str:
        result = CliRunner().invoke(build_app(), ["quality", *options])
        assert result.exit_code == 2, result.output
        return result.stderr

    text, out = ["--text", str(folder / "text.txt")], ["-o", str(tmp_path / "kv.safetensors")]
    model = ["--model", str(folder)]
    assert "has 112 tokens" in fails("capture", *model, *text, "--tokens", "120", "--queries", "4", *out)
    assert "no such folder" in fails("capture", "--model", str(tmp_path / "none"), *text, *out)
    assert "must end in .safetensors" in fails("capture", *model, *text, "-o", str(tmp_path / "kv.npz"))
    assert "--text" in fails("run", *model)
    assert "give one of" in fails("run", *model, *text, "--ensemble", "diffuse")


def test_a_text_that_is_not_there_is_named(folder: Path) -> None:
    _, tokenizer = load_model(str(folder))
    with pytest.raises(InvalidSpec, match=r"--text .*none\.txt: cannot read"):
        encode_text(tokenizer, folder / "none.txt", 4)
