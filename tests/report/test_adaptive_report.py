"""What a person sees of adaptive compression: special cases, refusals, and a section that adds up."""

from __future__ import annotations

import io
from typing import Any

import pytest

from kvsim.compression import STRATEGIES
from kvsim.documents import validate
from kvsim.errors import IncompatibleScenario, InvalidSpec, KvsimError, UnknownName
from kvsim.rendering.terminal import report_view
from kvsim.report import Report
from kvsim.scenario import Scenario
from kvsim.simulate import compare, estimate, explain, simulate

BURSTS: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "device": "h100-sxm",
    "bands": False,
    "engine": {"kv_cache_memory_bytes": "3 GiB", "max_num_seqs": 64},
    "workload": {
        "kind": "synthetic",
        "num_prompts": 150,
        "input_len": {"kind": "lognormal", "median_tokens": 900, "sigma": 0.7, "max_tokens": 8000},
        "output_len": {"kind": "lognormal", "median_tokens": 200, "sigma": 0.6, "max_tokens": 1500},
        "arrivals": {"kind": "gamma", "request_rate": 5, "burstiness": 0.1},
        "classes": [{"name": "chat", "share": 3}, {"name": "reasoning", "share": 1}],
    },
    "adaptive": {
        "levels": ["native", "fp8", "int4_per_token_head"],
        "policy": {"kind": "pressure", "high_watermark": 0.8, "low_watermark": 0.5, "min_dwell_s": "200 ms"},
        "requantize": {},
        "classes": {"reasoning": {"max_level": 0}},
    },
}


def scenario(**adaptive: Any) -> Scenario:
    """The bursts with keys of ``adaptive`` replaced; None takes a key away."""
    chosen = {key: value for key, value in {**BURSTS["adaptive"], **adaptive}.items() if value is not None}
    return validate(Scenario, {**BURSTS, "adaptive": chosen}, "s.yaml", require_units=True)


@pytest.fixture(scope="module")
def report() -> Report:
    return simulate(scenario())


# --- special cases --------------------------------------------------------------------------------------------------


def without_question(report: Report) -> dict[str, Any]:
    """Everything that a report answers, without how it was asked."""
    shown = report.model_dump(mode="json", exclude={"scenario"})
    shown["provenance"] = {**shown["provenance"], "scenario_sha256": "", "notes": []}
    return shown


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_static_policy_is_the_plain_scenario(strategy: str) -> None:
    other = "native" if strategy != "native" else "fp8"
    held = scenario(levels=[other, strategy], policy={"kind": "static", "level": 1}, requantize=None, classes=None)
    plain = held.with_strategy(strategy)
    answers = []
    for one in (held, plain):
        try:
            answers.append(without_question(simulate(one)))
        except KvsimError as error:
            answers.append(str(error).removeprefix("adaptive.levels.1: "))
    assert answers[0] == answers[1]


def test_one_level_is_the_plain_scenario() -> None:
    only = scenario(levels=["fp8"], requantize=None, classes=None)
    assert without_question(simulate(only)) == without_question(simulate(only.with_strategy("fp8")))


def test_a_level_may_skip_layers_of_its_own() -> None:
    level = {"compression": "fp8", "kv_cache_dtype_skip_layers": [0, 1, 31]}
    held = scenario(levels=["native", level], policy={"kind": "static", "level": 1}, requantize=None, classes=None)
    engine = {**BURSTS["engine"], "kv_cache_dtype_skip_layers": [0, 1, 31]}
    plain = {**BURSTS, "engine": engine, "compression": "fp8"}
    del plain["adaptive"]
    whole = validate(Scenario, plain, "s.yaml", require_units=True)
    assert without_question(simulate(held)) == {**without_question(simulate(whole)), "strategy": "fp8 but 0,1,31"}


def test_watermarks_that_are_never_reached_leave_level_0() -> None:
    calm = scenario(policy={"kind": "pressure", "high_watermark": 1.0}, requantize=None, classes=None)
    calm = calm.model_copy(update={"engine": calm.engine.model_copy(update={"kv_cache_memory_bytes": None})})
    plain, mine = simulate(calm.with_strategy("native")), simulate(calm)
    assert mine.adaptive is not None
    assert mine.adaptive.total_actions == 0
    assert mine.adaptive.reduced_share.value == 0
    for field in ("latency", "throughput", "counts", "kv", "energy", "cost", "effects", "duration_s"):
        assert getattr(mine, field) == getattr(plain, field), field


# --- the section ----------------------------------------------------------------------------------------------------


def test_the_section_adds_up(report: Report) -> None:
    use = report.adaptive
    assert use is not None
    assert use.tightened > 0
    assert use.relaxed > 0
    assert use.requantized_sequences > 0
    assert use.requantize_freed_bytes > 0
    assert 0 < use.requantize_s < report.duration_s.value
    assert sum(level.policy_s for level in use.levels) == pytest.approx(report.duration_s.value, abs=0.05)
    tokens = [level.tokens_decoded for level in use.levels]
    assert [sum(column) for column in zip(*(one.tokens_decoded for one in use.classes), strict=True)] == tokens
    assert use.reduced_share.value == pytest.approx(sum(tokens[1:]) / sum(tokens))
    assert sum(one.completed for one in use.classes) == report.counts.completed
    assert [level.kv_bytes_per_token for level in use.levels] == [131072, 65536, 34816]
    assert (
        len(use.actions)
        == use.total_actions
        == use.tightened + use.relaxed + sum(action.requantized_sequences > 0 for action in use.actions)
    )


def test_a_protected_class_keeps_its_precision(report: Report) -> None:
    chat, reasoning = report.adaptive.classes
    assert (chat.name, reasoning.name) == ("chat", "reasoning")
    assert reasoning.reduced_share.value == 0 < chat.reduced_share.value


def test_what_it_bought_stands_beside_each_level(report: Report) -> None:
    mine, *held = report.adaptive.outcomes
    assert mine.policy == "adaptive"
    assert [one.policy for one in held] == ["static:0", "static:1", "static:2"]
    assert mine.ttft_p99_s.value == report.latency.ttft.p99_s.value
    assert held[0].ttft_p99_s.value > mine.ttft_p99_s.value
    assert held[0].reduced_share.value == 0 < mine.reduced_share.value < held[1].reduced_share.value == 1
    plain = simulate(scenario().with_strategy("fp8"))
    assert held[1].ttft_p99_s.value == plain.latency.ttft.p99_s.value
    assert held[1].preemptions == plain.counts.preemptions


def test_quality_stays_unknown(report: Report) -> None:
    assert report.quality.status == "unknown"
    assert report.strategy == "adaptive"


def test_the_terminal_shows_it(report: Report) -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report_view(report))
    text = console.export_text()
    for word in (
        "Adaptive compression",
        "Request classes",
        "encoded again",
        "What adapting bought",
        "static:2",
        "level 0 to 1",
    ):
        assert word in text


def test_compare_runs_the_policy_beside_strategies() -> None:
    rows = compare(scenario(), ["adaptive", "static:1", "fp8"])
    adaptive, held, plain = (row.report for row in rows)
    assert adaptive.adaptive.total_actions > 0
    assert len(adaptive.adaptive.outcomes) == 1
    assert without_question(held) == without_question(plain)
    with pytest.raises(UnknownName, match="static:2"):
        compare(scenario(), ["static:7"])
    with pytest.raises(InvalidSpec, match="needs a scenario with adaptive levels"):
        compare(scenario().with_strategy("fp8"), ["adaptive"])


# --- refusals -------------------------------------------------------------------------------------------------------


def test_closed_forms_answer_static_policies_only() -> None:
    for ask in (estimate, explain):
        with pytest.raises(IncompatibleScenario, match="cannot say when a policy acts"):
            ask(scenario())
        ask(scenario(policy={"kind": "static", "level": 1}, requantize=None, classes=None))


@pytest.mark.parametrize(
    ("adaptive", "error", "said"),
    [
        ({"classes": {"reasonin": {}}}, UnknownName, "classes: unknown request class .*did you mean 'reasoning'"),
        ({"classes": {"chat": {"min_level": 2, "max_level": 1}}}, InvalidSpec, "no range of the levels 0 to 2"),
        ({"levels": ["native", "snapkv"], "classes": None}, InvalidSpec, "snapkv selects tokens"),
        ({"levels": ["fp8", "fp8_e4m3"], "classes": None}, InvalidSpec, "the same level is listed twice"),
        ({"policy": {"kind": "static"}}, InvalidSpec, "never changes its level"),
        ({"policy": {"kind": "pressure", "low_watermark": 0.95}}, InvalidSpec, "must be below high_watermark"),
        ({"policy": {"kind": "static", "level": 3}, "requantize": None}, InvalidSpec, "levels are numbered 0 to 2"),
        ({"levels": ["native", "mla"], "classes": None}, IncompatibleScenario, "levels.1: mla is an architecture"),
        ({"levels": ["native", {"compression": "fp8(attention_compute_dtype=fp8,dtype=e5m2)"}], "classes": None},
         IncompatibleScenario, "adaptive.levels.1: compression: "),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(adaptive: dict[str, Any], error: type[KvsimError], said: str) -> None:
    with pytest.raises(error, match=said):
        simulate(scenario(**adaptive))


def test_two_ways_to_compress_exclude_each_other() -> None:
    with pytest.raises(InvalidSpec, match="compression and adaptive exclude each other"):
        validate(Scenario, {**BURSTS, "compression": "fp8"}, "s.yaml")


def test_a_number_of_blocks_is_no_size_with_several_levels() -> None:
    several = scenario()
    engine = several.engine.model_copy(update={"num_gpu_blocks_override": 500, "kv_cache_memory_bytes": None})
    with pytest.raises(IncompatibleScenario, match="kv_cache_memory_bytes"):
        simulate(several.model_copy(update={"engine": engine}))


def test_classes_need_a_workload_with_classes() -> None:
    workload = {key: value for key, value in BURSTS["workload"].items() if key != "classes"}
    asked = validate(Scenario, {**BURSTS, "workload": workload}, "s.yaml", require_units=True)
    with pytest.raises(InvalidSpec, match="the workload has no request classes"):
        simulate(asked)


def shared_prefixes(**adaptive: Any) -> Scenario:
    workload = {**BURSTS["workload"], "shared_prefix_tokens": 512}
    asked = {**BURSTS, "workload": workload, "adaptive": {**BURSTS["adaptive"], **adaptive}}
    return validate(Scenario, asked, "s.yaml", require_units=True)


def test_prefixes_are_shared_within_a_level() -> None:
    """Every level computes the common prefix once for itself, unless what is encoded again brings it along."""
    left, encoded, held = (
        simulate(one).counts.cached_prompt_tokens
        for one in (
            shared_prefixes(requantize=None),
            shared_prefixes(),
            shared_prefixes().with_strategy("static:0"),
        )
    )
    assert 0 < left < encoded <= held


def test_a_level_that_evicts_turns_prefix_caching_off_and_the_report_says_so() -> None:
    found = simulate(shared_prefixes(levels=["native", "fp8", "snapkv"], requantize=None))
    assert found.counts.cached_prompt_tokens == 0
    assert any("prefix caching is off: snapkv evicts" in note for note in found.provenance.notes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": {"kv_offloading_size": "16 GiB"}}, "engine.kv_offloading_size: a tier holds blocks of one format"),
        (
            {"engine": {"kind": "llamacpp", "kv_cache_memory_bytes": None}},
            "engine.kind: adaptive levels are scheduled by vLLM's rules",
        ),
        ({"pipeline_parallel_size": 2, "tensor_parallel_size": 1}, "pipeline_parallel_size: sequences of different"),
    ],
)
def test_what_has_one_format_only_is_refused(options: dict[str, Any], said: str) -> None:
    engine = {**BURSTS["engine"], **options.get("engine", {})}
    with pytest.raises(IncompatibleScenario, match=said):
        simulate(validate(Scenario, {**BURSTS, **options, "engine": engine}, "s.yaml", require_units=True))
