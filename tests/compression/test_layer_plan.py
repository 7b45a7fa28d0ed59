"""Layer plans as data: spelling, which layer gets what, pricing, files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.compression import Compression, parse_compression, stored_bytes
from kvsim.compression.base import KvEncoding, LayerView
from kvsim.compression.encoding.layer_encodings import LayerEncodings
from kvsim.compression.plan_file import PlanFile, load_plan, named_strategy, plan_of, write_plan
from kvsim.compression.selection.base import TokenSelection
from kvsim.compression.selection.layer_plan import LayerPlan
from kvsim.compression.strategy import spell
from kvsim.errors import InvalidSpec, UnknownName
from kvsim.scenario import Scenario
from kvsim.simulate import estimate
from kvsim.specs.device import DeviceSpec
from kvsim.specs.model import ModelSpec

SELECTIONS = ("keep_all", "snapkv:0.25", "h2o:0.9", "streaming_llm:0.5", "quest:64", "snapkv:0.5(window_size=16)")
ENCODINGS = ("native", "fp8", "kivi-2", "turboquant_mse:3(value_bits=1.0)", "turboquant_mse:2", "kvquant-3")


@given(st.lists(st.sampled_from(SELECTIONS), min_size=1, max_size=8), st.sampled_from(["exact", "relative"]))
def test_a_plan_s_name_holds_all_of_it(entries: list[str], depth: str) -> None:
    given_text = f"layer_plan{'' if depth == 'exact' else ':relative'}[{';'.join(entries)}]"
    plan = parse_compression(given_text)
    assert parse_compression(plan.name) == plan
    assert Compression.model_validate_json(plan.model_dump_json()) == plan
    assert [one for one in plan.selection.layers] == [parse_compression(entry).selection for entry in entries]  # type: ignore[union-attr]  # noqa: C416
    assert plan.selection.depth == depth  # type: ignore[union-attr]


def test_runs_are_spelled_once_and_parts_join() -> None:
    assert parse_compression("layer_plan[h2o;h2o;snapkv]").name == "layer_plan[2*h2o;snapkv]"
    joined = parse_compression("layer_encodings:relative[fp8;kivi-2]+layer_plan:relative[h2o]")
    assert joined.name == "layer_plan:relative[h2o]+layer_encodings:relative[fp8;kivi-2]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer_plan", "needs what each layer does"),
        ("layer_encodings", r"layer_encodings\[2\*fp8"),
        ("layer_plan[x*h2o]", "whole number of layers"),
        ("layer_plan[0*h2o]", "whole number of layers"),
        ("layer_plan:deep[h2o]", "allowed: exact, relative"),
        ("layer_plan[fp8]", "'fp8' is not allowed"),
        ("layer_encodings[h2o]", "'h2o' is not allowed"),
        ("layer_encodings[kvtc]", "codes whole caches"),
        ("layer_encodings[fp8;kivi-2]+huffman", "no rate of huffman"),
        ("layer_plan[h2o;snapkv]+xkv", "keeps other tokens in each layer"),
        ("plan.yaml", "a plan file is opened only where a command names it"),
    ],
)
def test_wrong_plans_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        parse_compression(text)


def test_an_unknown_entry_comes_with_suggestions() -> None:
    with pytest.raises(UnknownName, match="snapkv"):
        parse_compression("layer_plan[snapvk]")


@given(st.integers(1, 9), st.integers(1, 40))
def test_relative_depth_shares_layers_out_in_order(entries: int, layers: int) -> None:
    plan = parse_compression(
        f"layer_plan:relative[{';'.join(f'snapkv:{64 + one}' for one in range(entries))}]"
    ).selection
    found = [plan.at_layer(LayerView(index, layers, None)).budget_tokens - 64 for index in range(layers)]  # type: ignore[arg-type, union-attr]
    assert found == sorted(found)
    counts = [found.count(one) for one in range(entries)]
    assert max(counts) - min(counts) <= 1


def test_an_exact_plan_is_refused_by_other_models(models: dict[str, ModelSpec], fp8_device: DeviceSpec) -> None:
    model = models["llama-3.1-8b"]
    for text in ("layer_plan[4*h2o]", "layer_encodings[4*fp8]"):
        reason = parse_compression(text).check(model, fp8_device)
        assert reason is not None
        assert "a model of 4 layers, and this one has 32" in reason
        assert "depth: relative" in reason
        with pytest.raises(InvalidSpec, match="a model of 4 layers"):
            stored_bytes(parse_compression(text), model, 100, 1)
    assert parse_compression("layer_plan[32*h2o]").check(model, fp8_device) is None


# --- a plan whose layers all say the same ---------------------------------------------------------------------------

UNIFORM = ("snapkv", "streaming_llm:0.75", "quest", "h2o:0.9", "pyramidkv", "keydiff:0.25")


@pytest.mark.parametrize("name", UNIFORM)
@pytest.mark.parametrize("plan", ["layer_plan:relative[{}]", "layer_plan[32*{}]"])
def test_bytes_of_one_policy_everywhere_are_that_policy_s(name: str, plan: str, models: dict[str, ModelSpec]) -> None:
    model = models["llama-3.1-8b"]
    ours, theirs = parse_compression(plan.format(name)), parse_compression(name)
    for prompt, generated in ((0, 0), (100, 7), (5000, 300)):
        assert stored_bytes(ours, model, prompt, generated) == stored_bytes(theirs, model, prompt, generated)


@pytest.mark.parametrize(
    ("plan", "name"),
    [
        *(("layer_plan:relative[{}]", name) for name in UNIFORM),
        *(("layer_encodings[32*{}]", name) for name in ("fp8", "kivi-2", "turboquant_4bit_nc", "kvquant-3")),
    ],
)
def test_a_report_of_one_policy_everywhere_is_that_policy_s(plan: str, name: str) -> None:
    """All figures agree to the last bit; names, notes on published scores and fingerprints may differ."""
    found = []
    for text in (plan.format(name), name):
        scenario = Scenario(
            model="llama-3.1-8b", device="h100-sxm", workload="chat", compression=parse_compression(text)
        )
        document = estimate(scenario).model_dump(mode="json")
        found.append({key: document[key] for key in document if key not in _NAMING})
    assert found[0] == found[1]


_NAMING = ("strategy", "quality", "provenance", "scenario", "notes", "energy_notes")


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_file_comes_back(tmp_path: Path) -> None:
    made = parse_compression("layer_plan[snapkv:0.9;2*h2o:0.25]+layer_encodings[fp8;2*turboquant_mse:3]")
    plan = plan_of(made, "mine", "by hand", {"held_out_harm": 0.25})
    write_plan(tmp_path / "plan.yaml", plan)
    assert load_plan(tmp_path / "plan.yaml") == plan
    assert parse_compression(plan.strategy) == made
    assert named_strategy(f"{tmp_path / 'plan.yaml'}+think") == f"{made.name}+think"
    assert named_strategy("snapkv+fp8") == "snapkv+fp8"


def test_equal_plans_make_equal_scenarios_wherever_they_lie(tmp_path: Path) -> None:
    texts = []
    for name in ("a.yaml", "b.yaml"):
        write_plan(
            tmp_path / name, PlanFile(name=name, source=name, depth="relative", selections=("h2o", "snapkv:0.1"))
        )
        texts.append(named_strategy(str(tmp_path / name)))
    scenarios = [
        Scenario(model="llama-3.1-8b", device="h100-sxm", workload="chat", compression=parse_compression(text))
        for text in texts
    ]
    assert scenarios[0].fingerprint() == scenarios[1].fingerprint()
    assert str(tmp_path) not in scenarios[0].model_dump_json()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("name: x\nsource: y\n", "give selections, encodings or both"),
        ("name: x\nsource: y\nselections: [h2o, h2o]\nencodings: [fp8]\n", "for 2 layers and encodings for 1"),
        ("name: x\nsource: y\nselections: [fp8]\n", "'fp8' is not allowed"),
        ("name: x\nsource: y\nselections: [h20]\n", "unknown strategy 'h20'"),
        ("name: x\nselections: [h2o]\n", "source"),
        ("name: x\nsource: y\nselections: [h2o]\nschema_version: 2\n", "schema_version"),
    ],
)
def test_a_wrong_file_names_itself(document: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(document)
    with pytest.raises((InvalidSpec, UnknownName), match=message) as caught:
        load_plan(path)
    assert "plan.yaml" in str(caught.value)


def test_a_scenario_of_before_keeps_its_fingerprint() -> None:
    """Second ways to give a size are left out where they are not used."""
    assert set(parse_compression("streaming_llm").selection.model_dump()) == {
        "kind",
        "num_sink_tokens",
        "window_length",
    }
    assert "value_bits" not in parse_compression("turboquant_mse").encoding.model_dump()
    assert spell(parse_compression("turboquant_mse:3(value_bits=1)").encoding) == "turboquant_mse:3(value_bits=1.0)"


# --- nothing is forgotten -------------------------------------------------------------------------------------------

WITHOUT_LAYERS = {
    "at_layer", "bare_name", "inline_parameters", "inline_text", "joins_layers", "is_replicated", "rate", "masked_in",
    "residual_share", "unpriced_coder", "is_storage_only", "unpack_family", "native_tokens", "trained_group",
}  # fmt: skip
"""What is the same for every entry (plans refuse those that differ), or follows from what is overridden."""


@pytest.mark.parametrize(("plan", "base"), [(LayerPlan, TokenSelection), (LayerEncodings, KvEncoding)])
def test_a_plan_answers_every_hook_itself(plan: type, base: type) -> None:
    """A hook that a plan inherits would say 'nothing special' of entries that have something special."""
    hooks = {
        name
        for one in base.__mro__
        if one.__module__.startswith("kvsim.compression")
        for name, value in vars(one).items()
        if not name.startswith("_") and (isinstance(value, property) or callable(value))
    }
    forgotten = hooks - set(vars(plan)) - WITHOUT_LAYERS
    assert not forgotten
