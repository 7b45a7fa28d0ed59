"""What fits on one person's device: limits, rates that heat leaves, energy and battery."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvsim.catalog import resolve
from kvsim.cli import build_app
from kvsim.closed_form import decode_split, total_seconds
from kvsim.compression import parse_compression
from kvsim.cost.priors import Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.step import StepModel
from kvsim.device_catalog import load_device
from kvsim.edge import EdgeAnswer, EdgeQuestion, edge_answers
from kvsim.errors import InvalidSpec
from kvsim.rendering.edge import edge_view
from kvsim.scenario import Scenario

STRATEGIES = ("native", "q8_0", "q4_0", "snapkv", "streaming_llm:1024")


def _scenario(model: str = "llama-3.2-1b", device: str = "apple-a18-pro") -> Scenario:
    return Scenario.model_validate(
        {
            "model": model,
            "device": device,
            "workload": "phone-assistant",
            "engine": {"kind": "llamacpp", "max_num_seqs": 1},
        }
    )


def _ask(name: str, question: EdgeQuestion | None = None, **scenario: str) -> EdgeAnswer:
    return edge_answers(_scenario(**scenario), (name,), question or EdgeQuestion())[0]


def _value(figure: object) -> float:
    value = getattr(figure, "value", None)
    assert value is not None
    return float(value)


@pytest.mark.parametrize("device", ["apple-a18-pro", "snapdragon-8-gen-3", "apple-m4-max"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_longest_context_is_the_least_of_three(name: str, device: str) -> None:
    answer = _ask(name, device=device)
    memory = answer.memory_tokens.value if answer.memory_tokens else None
    ends = {"reading speed": _value(answer.readable_tokens), "model": float(answer.model_tokens or 0)}
    if memory is not None:
        ends["memory"] = memory
    assert _value(answer.context_tokens) == min(ends.values())
    assert answer.limit is not None
    assert ends[answer.limit] == min(ends.values())


def test_one_token_more_is_too_slow() -> None:
    scenario = _scenario()
    deployment = resolve(scenario)
    step = StepModel(deployment, build_rates(deployment.device, deployment.priors, Edge.CENTRAL))
    readable = int(_value(_ask("native").readable_tokens))
    kept = load_device("apple-a18-pro").spec.sustained_decode
    assert kept is not None
    slowest_s = kept.value / 5.3
    assert total_seconds(decode_split(step, 1, readable, 0)) <= slowest_s
    assert total_seconds(decode_split(step, 1, readable + 1, 0)) > slowest_s


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_slower_reader_gets_more_context(name: str) -> None:
    found = [_value(_ask(name, EdgeQuestion(speed)).readable_tokens) for speed in (2.0, 4.0, 8.0, 1e6)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == 0


def test_smaller_elements_hold_more() -> None:
    native, int8, int4 = (_value(_ask(name).memory_tokens) for name in ("native", "q8_0", "q4_0"))
    assert native < int8 < int4
    # Fixed sizes of the plan aside, memory goes by bytes: 16, 8.5 and 4.5 bits.
    assert int8 / native == pytest.approx(16 / 8.5, rel=0.01)
    assert int4 / native == pytest.approx(16 / 4.5, rel=0.01)


def test_eviction_after_the_prompt_lengthens_no_prompt() -> None:
    assert _ask("snapkv").memory_tokens == _ask("native").memory_tokens
    bounded = _ask("streaming_llm:1024").memory_tokens
    assert bounded is not None
    assert bounded.value is None


def test_heat_takes_its_share_of_the_rate() -> None:
    answer = _ask("native", EdgeQuestion(context_tokens=1000))
    assert _value(answer.sustained_tokens_per_s) == pytest.approx(0.55 * _value(answer.decode_tokens_per_s))
    nobody_says = _ask("native", device="snapdragon-8-gen-3").sustained_tokens_per_s
    assert nobody_says is not None
    assert nobody_says.value is None


def test_energy_is_power_over_rate() -> None:
    phone = _ask("native", EdgeQuestion(context_tokens=1000))
    assert _value(phone.joules_per_token) == pytest.approx(_value(phone.power_w) / _value(phone.sustained_tokens_per_s))
    laptop = _ask("native", EdgeQuestion(context_tokens=1000, power_w=20.0), device="apple-m4-max")
    assert _value(laptop.joules_per_token) == pytest.approx(20.0 / _value(laptop.decode_tokens_per_s))


def test_a_phone_whose_lasting_rate_nobody_states_has_no_energy() -> None:
    answer = _ask("native", device="snapdragon-8-gen-3")
    assert answer.joules_per_token is not None
    assert answer.joules_per_token.value is None
    assert any("contexts are judged cold" in note for note in answer.notes)


def test_battery_is_energy_over_power() -> None:
    answer = _ask("native", EdgeQuestion(context_tokens=1000, battery_j=36_000.0, power_w=5.0))
    assert _value(answer.battery_s) == 7200.0
    assert _value(answer.battery_tokens) == pytest.approx(36_000.0 / _value(answer.joules_per_token))
    unknown = _ask("native", device="apple-m4-max").battery_s
    assert unknown is not None
    assert unknown.value is None


@pytest.mark.parametrize("name", STRATEGIES)
def test_bands_hold_the_central_value(name: str) -> None:
    answer = _ask(name)
    for field in ("readable_tokens", "context_tokens", "decode_tokens_per_s", "joules_per_token", "battery_s"):
        figure = getattr(answer, field)
        assert figure.low <= figure.value <= figure.high, field


def test_what_does_not_fit_keeps_a_row_with_the_reason() -> None:
    answer = _ask("q8_0", model="llama-3.1-8b")
    assert answer.reason is not None
    assert "does not fit" in answer.reason
    assert answer.context_tokens is None


@pytest.mark.parametrize("field", ["reading_tokens_per_s", "context_tokens", "battery_j", "power_w"])
def test_sizes_must_be_positive(field: str) -> None:
    with pytest.raises(InvalidSpec, match=field):
        edge_answers(_scenario(), ("native",), replace(EdgeQuestion(), **{field: 0}))


def test_the_answer_is_of_the_strategy_asked_for() -> None:
    deployment = resolve(_scenario().model_copy(update={"compression": parse_compression("q8_0")}))
    step = StepModel(deployment, build_rates(deployment.device, deployment.priors, Edge.CENTRAL))
    answer = _ask("q8_0", EdgeQuestion(context_tokens=2000))
    assert _value(answer.decode_tokens_per_s) == 1 / total_seconds(decode_split(step, 1, 2000, 0))


def test_command() -> None:
    runner = CliRunner()
    given = ["edge", "--model", "llama-3.2-1b", "--device", "apple-a18-pro", "-s", "native,q8_0"]
    result = runner.invoke(build_app(), [*given, "--battery", "13.8 Wh", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["strategy"] for row in rows] == ["native", "q8_0"]
    assert rows == [answer.model_dump(mode="json") for answer in edge_answers(_scenario(), ("native", "q8_0"))]
    table = runner.invoke(build_app(), given, env={"COLUMNS": "160"})
    assert "reading speed" in table.stdout
    assert "276 min" in table.stdout
    wrong = runner.invoke(build_app(), [*given, "--battery", "4"])
    assert wrong.exit_code == 2
    assert "--battery" in wrong.stderr


@pytest.mark.parametrize("columns", [80, 100, 120, 170, 180])
def test_the_table_cuts_no_figure_on_a_narrow_terminal(columns):
    answers = edge_answers(_scenario(), ("native", "snapkv+q8_0", "streaming_llm:1024"))
    console = Console(width=columns, file=StringIO())
    with console.capture() as capture:
        console.print(edge_view(answers, 5.3, columns))
    shown = capture.get()
    assert "…" not in shown
    assert {"native", "snapkv+q8_0", "streaming_llm:1024", "J/token"} <= set(shown.split())
    assert ("Bands, and" in shown) == (columns < 180)
