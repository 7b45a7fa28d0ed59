"""Finding models by name, file, folder and hub id."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvsim import model_catalog
from kvsim.errors import InvalidSpec, ScenarioError, UnknownName
from kvsim.model_catalog import list_models, load_model, load_preset

SHARED_CONFIGS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "model_configs"
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
}


def write_config(path: Path, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**CONFIG, **changes}))
    return path


def test_preset_by_name_in_any_case_and_by_hub_id():
    model = load_model("llama-3.1-8b")
    assert model.name == "llama-3.1-8b"
    assert load_model("Llama-3.1-8B") is model
    assert load_model("meta-llama/Llama-3.1-8B-Instruct") is model
    assert load_model("META-LLAMA/llama-3.1-8b-instruct") is model


def test_unknown_names_come_with_suggestions():
    with pytest.raises(UnknownName, match=r"unknown model 'gpt-os-20b'; did you mean 'gpt-oss-20b'"):
        load_model("gpt-os-20b")


def test_file_and_folder(tmp_path: Path):
    path = write_config(tmp_path / "tiny" / "config.json")
    by_file, by_folder = load_model(str(path)), load_model(str(path.parent))
    assert by_file == by_folder
    assert by_file.name == "tiny"
    assert by_file.source == str(path)
    assert load_model("tiny", base_dir=tmp_path) == by_file
    assert load_model("tiny/config.json", base_dir=tmp_path) == by_file


def test_an_edited_file_is_read_again(tmp_path: Path):
    path = write_config(tmp_path / "config.json")
    assert load_model(str(path)).num_layers == 2
    write_config(path, num_hidden_layers=3)
    os.utime(path, ns=(1, 1))
    assert load_model(str(path)).num_layers == 3


def test_modelopt_file_beside_the_config_gives_the_weight_format(tmp_path: Path):
    path = write_config(tmp_path / "config.json")
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4", "group_size": 16}}')
    assert load_model(str(path)).weight_bits == 4.5


def test_infinity_in_a_config_is_read_as_absent(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, "sliding_window": float("inf"), "head_dim": float("nan")}))
    assert load_model(str(path)).groups[0].k_head_dim == 16


@pytest.mark.parametrize(
    ("content", "mentions"),
    [
        ("{", ["config.json", "not valid JSON"]),
        ("[1]", ["config.json", "must be an object"]),
        ("{}", ["config.json", "num_hidden_layers", "missing"]),
        ('{"layer_types": ["x"], "num_hidden_layers": 1, "num_attention_heads": 1}', ["layer_types", "'x'"]),
    ],
)
def test_bad_files_are_refused_with_file_and_key(tmp_path: Path, content: str, mentions: list[str]):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InvalidSpec) as caught:
        load_model(str(tmp_path))
    for mention in mentions:
        assert mention in str(caught.value)


def test_missing_paths_are_not_taken_for_hub_ids(tmp_path: Path):
    with pytest.raises(InvalidSpec, match="holds no config"):
        load_model(str(tmp_path))
    for name in ("./nowhere", "/nowhere/at-all", "nowhere/config.json"):
        with pytest.raises(InvalidSpec, match="no such config file or folder"):
            load_model(name, base_dir=tmp_path)


@given(st.text(max_size=20).filter(lambda text: "/" not in text and text.strip().lower() not in list_models()))
@example("")
@example("\0")
@example("x" * 5000)
@example("~nobody-of-that-name")
def test_any_text_is_a_scenario_error(tmp_path_factory: pytest.TempPathFactory, text: str):
    empty = tmp_path_factory.getbasetemp() / "empty"
    empty.mkdir(exist_ok=True)
    with pytest.raises(ScenarioError):
        load_model(text, base_dir=empty)


class FakeHub:
    """Stands in for ``huggingface_hub.hf_hub_download``."""

    def __init__(self, cached: Path | None, online: Path | None) -> None:
        self.cached, self.online = cached, online
        self.calls: list[tuple[str, str, str | None, bool]] = []

    def __call__(
        self, repo_id: str, filename: str, *, revision: str | None = None, local_files_only: bool = False
    ) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        self.calls.append((repo_id, filename, revision, local_files_only))
        path = self.cached if local_files_only else self.online
        if path is None:
            message = "not there"
            raise LocalEntryNotFoundError(message)
        return str(path)


@pytest.fixture
def install_hub(monkeypatch: pytest.MonkeyPatch):
    hub = pytest.importorskip("huggingface_hub")
    model_catalog._load_from_hub.cache_clear()

    def install(fake: FakeHub) -> FakeHub:
        monkeypatch.setattr(hub, "hf_hub_download", fake)
        return fake

    yield install
    model_catalog._load_from_hub.cache_clear()


def test_hub_reads_only_the_config_and_the_cache_first(tmp_path: Path, install_hub):
    hub = install_hub(FakeHub(cached=write_config(tmp_path / "config.json"), online=None))
    model = load_model("some-org/Some-Model@abc123", base_dir=tmp_path)
    assert model.source == "some-org/Some-Model@abc123"
    assert hub.calls == [("some-org/Some-Model", "config.json", "abc123", True)]
    assert load_model("some-org/Some-Model@abc123", base_dir=tmp_path) is model
    assert len(hub.calls) == 1


def test_hub_fetches_what_the_cache_lacks(tmp_path: Path, install_hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    hub = install_hub(FakeHub(cached=None, online=write_config(tmp_path / "config.json")))
    assert load_model("some-org/Some-Model", base_dir=tmp_path).num_layers == 2
    assert [call[3] for call in hub.calls] == [True, False]


def test_offline_never_asks_the_network(tmp_path: Path, install_hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = install_hub(FakeHub(cached=None, online=write_config(tmp_path / "config.json")))
    with pytest.raises(InvalidSpec, match="HF_HUB_OFFLINE"):
        load_model("some-org/Some-Model", base_dir=tmp_path)
    assert [call[3] for call in hub.calls] == [True]


def test_unreachable_hub_is_explained(tmp_path: Path, install_hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    install_hub(FakeHub(cached=None, online=None))
    with pytest.raises(InvalidSpec, match=r"could not be fetched: .*presets with a like name: .*qwen3-8b"):
        load_model("Qwen/qwen3-8bb", base_dir=tmp_path)


def test_missing_extra_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model_catalog._load_from_hub.cache_clear()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InvalidSpec, match=r"pip install 'kvsim\[hub\]'"):
        load_model("some-org/Some-Model", base_dir=tmp_path)


def test_invalid_hub_id(tmp_path: Path):
    pytest.importorskip("huggingface_hub")
    with pytest.raises(InvalidSpec, match="not a valid hub id"):
        load_model("some--org/..model", base_dir=tmp_path)


def test_presets_load_within_two_milliseconds():
    names = list_models()
    for name in names:
        load_preset(name)
    load_preset.cache_clear()
    durations = []
    for name in names:
        start = time.perf_counter()
        load_preset(name)
        durations.append(time.perf_counter() - start)
    assert sorted(durations)[len(durations) // 2] < 0.002


@pytest.mark.skipif(not SHARED_CONFIGS.is_dir(), reason="shared model configs are not beside this checkout")
@pytest.mark.parametrize(
    ("folder", "preset"),
    [
        ("llama-3.1-8b-instruct", "llama-3.1-8b"),
        ("mistral-nemo-instruct-2407", "mistral-nemo-12b"),
        ("mixtral-8x7b-v0.1", "mixtral-8x7b"),
        ("qwen3-30b-a3b", "qwen3-30b-a3b"),
        ("deepseek-v2-lite", "deepseek-v2-lite"),
        ("llama-4-scout-17b-16e-instruct-fp8-dynamic", "llama-4-scout-fp8"),
    ],
)
def test_presets_agree_with_the_whole_config(folder: str, preset: str):
    whole, short = load_model(str(SHARED_CONFIGS / folder)), load_model(preset)
    ignored = {"name", "source", "generation"}
    assert whole.model_dump(exclude=ignored) == short.model_dump(exclude=ignored)
