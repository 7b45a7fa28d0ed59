import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kvsim.compression import parse_compression
from kvsim.errors import InvalidSpec, ScenarioError
from kvsim.scenario import Scenario
from kvsim.scenario_file import build_scenario, load_scenario, parse_override
from kvsim.workload_catalog import list_workloads, load_workload

SMALLEST = "model: llama-3.1-8b\ndevice: h100-sxm\nworkload: chat\n"
DOCUMENT = {"model": "llama-3.1-8b", "device": "h100-sxm", "workload": "chat"}


@pytest.fixture
def scenario_path(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(SMALLEST)
    return path


def test_the_smallest_scenario_has_three_keys(scenario_path):
    assert load_scenario(scenario_path) == Scenario(**DOCUMENT)


def test_overrides_change_nested_fields_and_the_last_one_wins(scenario_path):
    scenario = load_scenario(
        scenario_path, ["engine.max_num_seqs=64", "compression=fp8", "engine.max_num_seqs=128", "slo.ttft_s=500 ms"]
    )
    assert scenario.engine.max_num_seqs == 128
    assert scenario.compression == parse_compression("fp8")
    assert scenario.slo.ttft_s == 0.5


def test_one_parameter_of_a_preset_can_change(scenario_path):
    changed = load_scenario(scenario_path, ["workload.arrivals.request_rate=7.5"]).workload
    preset = load_workload("chat")
    assert changed.arrivals.request_rate == 7.5
    assert changed.input_len == preset.input_len


@pytest.mark.parametrize("name", list_workloads())
def test_every_preset_survives_being_spelled_out(name):
    """Setting one field to its own value changes nothing, so units and optional fields come through."""
    preset = load_workload(name)
    document = DOCUMENT | {"workload": name}
    rebuilt = build_scenario(document, [("workload.num_prompts", preset.num_prompts)], "s.yaml")
    assert rebuilt.workload == preset


def test_a_preset_is_not_changed_by_an_override(scenario_path):
    before = load_workload("chat").model_dump()
    load_scenario(scenario_path, ["workload.num_prompts=3"])
    assert load_workload("chat").model_dump() == before
    assert load_scenario(scenario_path, ["workload.shared_prefix_tokens=8"]).workload.num_prompts != 3


def test_json_files_may_hold_plain_si_numbers(tmp_path):
    scenario = Scenario(**DOCUMENT, slo={"ttft_s": "2 s"})
    path = tmp_path / "s.json"
    path.write_text(scenario.model_dump_json())
    assert load_scenario(path) == scenario


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "3", "{1: 2}"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(InvalidSpec, match="must be a mapping"):
        load_scenario(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("engine.max_num_seqs", "is not of the form key=value"),
        ("=3", "is not of the form key=value"),
        ("engine.nope=3", "unknown key 'nope'"),
        ("engine.max_num_seqs=[1", "not valid YAML"),
        ("model.name=3", "unknown key 'name'"),
    ],
)
def test_overrides_that_cannot_be_read(text, expected):
    with pytest.raises(InvalidSpec, match=expected):
        parse_override(text)


def test_duplicate_keys_are_refused_with_their_line(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(SMALLEST + "model: other\n")
    with pytest.raises(InvalidSpec, match=r"line 4.*duplicate key 'model'"):
        load_scenario(path)


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()
)


@given(value=st.one_of(scalars, st.lists(scalars, max_size=3)))
def test_a_value_written_as_yaml_is_read_back(value):
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=False)
    assert parse_override(f"engine.max_num_seqs={text}")[1] == value


@given(text=st.text(max_size=60))
def test_any_override_text_is_read_or_refused(text):
    try:
        key, _ = parse_override(text)
    except ScenarioError:
        return
    assert key == text.partition("=")[0].strip()


mappings = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


@given(document=st.dictionaries(st.sampled_from([*Scenario.model_fields, "other"]), mappings))
def test_any_document_becomes_a_scenario_or_a_message(document):
    try:
        scenario = build_scenario(document, [], "s.yaml")
    except ScenarioError as error:
        message = str(error)
        assert message.startswith("s.yaml: ")
        return
    assert Scenario.model_validate(json.loads(scenario.model_dump_json())) == scenario
