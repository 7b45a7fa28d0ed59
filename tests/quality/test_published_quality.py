"""Published scores: sourced, of this very strategy or read between two of one curve, unknown otherwise."""

from __future__ import annotations

from math import log2

import pytest

from kvsim.compression import STRATEGIES, Compression, parse_compression
from kvsim.documents import validate
from kvsim.errors import InvalidSpec
from kvsim.quality import published, published_notes, published_quality
from kvsim.quality.interpolation import between
from kvsim.quality.published import QualityTable
from kvsim.report import Quality, QualityNote


def note(value: float, **changes: object) -> QualityNote:
    fields = {"task": "T", "metric": "score", "value": value, "baseline": 90.0, "model": "M", "source": "S",
              "task_class": "reasoning"}  # fmt: skip
    return QualityNote.model_validate(fields | changes)


def read_between(name: str, *rows: tuple[str, QualityNote]) -> list[QualityNote]:
    parsed = [(parse_compression(strategy), one) for strategy, one in rows]
    wanted = parse_compression(name)
    return list(between(wanted, parsed, [one for compression, one in parsed if compression == wanted]))


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch):
    """Put made-up rows in the place of the published ones."""

    def fill(*rows: tuple[str, QualityNote]) -> None:
        parsed = tuple((parse_compression(name), one) for name, one in rows)
        monkeypatch.setattr(published, "published_notes", lambda: parsed)
        published_quality.cache_clear()

    yield fill
    monkeypatch.undo()
    published_quality.cache_clear()


# --- the shipped table -----------------------------------------------------------------------------------------------


def test_native_is_the_baseline() -> None:
    quality = published_quality(Compression())
    assert (quality.status, quality.notes) == ("baseline", ())


@pytest.mark.parametrize("name", ["snapkv:0.95", "snapkv+fp8", "quest", "int8_per_token_head", "kivi-2(group_size=64)"])
def test_unpublished_is_unknown_and_carries_no_number(name: str) -> None:
    quality = published_quality(parse_compression(name))
    assert (quality.status, quality.notes) == ("unknown", ())


@pytest.mark.parametrize(
    ("name", "task", "model", "value", "baseline", "task_class"),
    [
        ("turboquant_3bit_nc", "AIME25", "Qwen3-30B-A3B-Thinking", 62.3, 86.3, "reasoning"),
        ("turboquant_k8v4", "GPQA-Diamond", "Qwen3-30B-A3B-Thinking", 73.1, 72.8, "reasoning"),
        ("turboquant_3bit_nc", "perplexity", "not named", 20.59, 0.0, "language modelling"),
        ("fp8", "MRCR", "Qwen3-30B-A3B-Instruct", 43.1, 45.8, "long-context retrieval"),
        ("kivi-2", "LongBench PassageRetrieval", "Mistral-7B-Instruct", 80.83, 89.33, "long-context retrieval"),
        ("kivi-2", "LongBench-E", "Llama-3.1-8B-Instruct", 48.5, 50.06, "long-context understanding"),
        ("kivi-2", "MMLU", "Llama-3.1-8B", 59.6, 60.5, "knowledge"),
        ("mxfp4", "AIME25", "gpt-oss-120b", 35.3, 75.3, "reasoning"),
        ("mxfp4", "GSM8K", "gpt-oss-120b", 91.5, 91.6, "short reasoning"),
        ("pyramidkv:128", "LongBench", "Llama-3-8B-Instruct", 37.25, 41.46, "long-context understanding"),
    ],
)
def test_published_scores(name: str, task: str, model: str, value: float, baseline: float, task_class: str) -> None:
    quality = published_quality(parse_compression(name))
    assert quality.status == "published"
    (found,) = (note for note in quality.notes if (note.task, note.model) == (task, model))
    assert (found.value, found.baseline, found.task_class) == (value, baseline, task_class)
    assert found.interpolated_between is None


def test_every_row_says_where_it_comes_from_and_what_it_is() -> None:
    for compression, found in published_notes():
        assert found.source
        assert found.model
        assert found.interpolated_between is None
        is_perplexity = "perplexity" in found.metric.lower() or "perplexity" in found.task.lower()
        assert (found.direction == "lower") == (is_perplexity or found.metric.endswith(("lost", "lost %"))), found.line
        assert (found.task_class == "language modelling") <= is_perplexity, found.line
        if found.baseline and found.direction == "higher":
            assert 0 < found.value <= 100
            assert 0 < found.baseline <= 100
        if "digitised" in found.source:
            assert found.evidence == "digitised"
        if "secondary source" in found.source:
            assert found.evidence == "secondary"
        if found.query is not None:
            assert compression.selection.kind != "keep_all", (
                "without a selection the question is neither seen nor hidden"
            )
        if compression.selection.kind != "keep_all":
            assert found.query is not None, found.line


def test_reasoning_is_a_class_of_its_own() -> None:
    for _, found in published_notes():
        thinks_long = found.task.startswith(("AIME", "GPQA", "LiveCodeBench", "MATH500", "reasoning"))
        assert thinks_long == (found.task_class == "reasoning"), found.task
        assert (found.task == "GSM8K") == (found.task_class == "short reasoning"), found.task


def test_no_row_is_given_twice() -> None:
    keys = [
        (one.name, found.task, found.model, found.metric, found.setting, found.source)
        for one, found in published_notes()
    ]
    assert len(set(keys)) == len(keys)


def test_every_published_strategy_is_spelled_canonically() -> None:
    known = set(STRATEGIES)
    for compression, _ in published_notes():
        assert parse_compression(compression.name) == compression
        assert compression.name.split(":")[0].split("(")[0] in known


# --- between two scores of one curve ---------------------------------------------------------------------------------


def test_snapkv_between_two_published_ratios() -> None:
    quality = published_quality(parse_compression("snapkv:0.7"))
    (found,) = quality.notes
    assert quality.status == "interpolated"
    assert found.interpolated_between == ("snapkv", "snapkv:0.75")
    assert found.task == "RULER 4k"
    assert found.value == pytest.approx(66.9 + (40.0 - 66.9) * 0.2 / 0.25)
    assert found.evidence_line.startswith("digitised, interpolated between")


def test_budgets_are_read_on_a_logarithmic_scale() -> None:
    (found,) = read_between("h2o:512", ("h2o:128", note(30.0)), ("h2o:2048", note(40.0)))
    assert found.value == pytest.approx(30 + 10 * log2(512 / 128) / log2(2048 / 128))


@pytest.mark.parametrize("name", ["snapkv:0.2", "snapkv:0.8"])
def test_nothing_is_extrapolated(name: str) -> None:
    assert read_between(name, ("snapkv:0.25", note(80.0)), ("snapkv:0.75", note(40.0))) == []


@pytest.mark.parametrize(
    "other",
    [
        {"task": "U"}, {"task_class": "code"}, {"model": "N"}, {"source": "R"}, {"metric": "AUC"}, {"baseline": 91.0},
        {"query": "aware"}, {"reasoning": True}, {"setting": "long"}, {"evidence": "secondary"},
        {"direction": "lower"}, {"bound": "at most"},
    ],
)  # fmt: skip
def test_a_curve_is_one_source_model_task_and_setting(other: dict[str, object]) -> None:
    assert read_between("snapkv:0.5", ("snapkv:0.25", note(80.0)), ("snapkv:0.75", note(40.0, **other))) == []


@pytest.mark.parametrize("other", ["h2o:0.75", "snapkv:0.75+fp8", "snapkv:0.75(window_size=32)", "snapkv:1024"])
def test_points_of_a_curve_differ_in_one_size_alone(other: str) -> None:
    assert read_between("snapkv:0.5", ("snapkv:0.25", note(80.0)), (other, note(40.0))) == []


def test_the_nearest_neighbours_count_and_a_score_of_its_own_comes_first() -> None:
    rows = [(f"snapkv:{ratio}", note(100 - 100 * ratio**2)) for ratio in (0.1, 0.25, 0.5, 0.75, 0.9)]
    (found,) = read_between("snapkv:0.6", *rows)
    assert found.interpolated_between == ("snapkv", "snapkv:0.75")
    assert read_between("snapkv:0.5", *rows) == []


@pytest.mark.parametrize("ratio", [0.26, 0.4, 0.74])
def test_a_value_between_lies_between(ratio: float) -> None:
    (found,) = read_between(f"snapkv:{ratio}", ("snapkv:0.25", note(80.0)), ("snapkv:0.75", note(40.0)))
    assert 40.0 < found.value < 80.0
    assert found.baseline == 90.0


# --- what scores do not cover ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("notes", "is_warned"),
    [
        ([note(89.5, task_class="short reasoning")], True),
        ([note(80.0, task_class="short reasoning")], False),
        ([note(89.5, task_class="short reasoning"), note(50.0)], False),
        ([note(89.5, task_class="long-context retrieval")], False),
        ([note(1.0, task_class="short reasoning", direction="lower", baseline=0.0, bound="at most")], True),
        ([note(89.5, task_class="short reasoning", baseline=None)], False),
    ],
)
def test_flat_short_reasoning_without_a_reasoning_score_is_warned_of(table, notes, is_warned: bool) -> None:
    table(*(("nvfp4", one) for one in notes))
    quality = published_quality(parse_compression("nvfp4"))
    assert bool(quality.warnings) == is_warned
    if is_warned:
        assert "AIME25" in quality.warnings[0]


def test_the_warnings_numbers_are_those_of_the_table() -> None:
    def loss(name: str, task: str, model: str) -> float:
        found = published_quality(parse_compression(name)).notes
        return next(one.baseline - one.value for one in found if (one.task, one.model) == (task, model))

    assert loss("mxfp4", "GSM8K", "Qwen3-235B-A22B") == pytest.approx(-0.2)
    assert loss("mxfp4", "GSM8K", "gpt-oss-120b") == pytest.approx(0.1)
    assert loss("mxfp4", "AIME25", "Qwen3-235B-A22B") == pytest.approx(17, abs=0.5)
    assert loss("mxfp4", "AIME25", "gpt-oss-120b") == pytest.approx(40)
    assert loss("turboquant_4bit_nc", "AIME25", "Qwen3-30B-A3B-Thinking") == pytest.approx(5)


# --- files and text --------------------------------------------------------------------------------------------------


def test_defaults_fill_rows_and_rows_overrule_them() -> None:
    row = {"strategy": "fp8", "task": "T", "value": 1.0, "baseline": 2.0}
    defaults = {"task_class": "code", "metric": "score", "model": "M", "evidence": "secondary"}
    read = validate(QualityTable, {"source": "S", "defaults": defaults, "rows": [row, {**row, "model": "N"}]}, "f")
    assert [one.model for one in read.rows] == ["M", "N"]
    assert {one.evidence for one in read.rows} == {"secondary"}


@pytest.mark.parametrize(
    ("change", "match"),
    [({"task_class": "maths"}, "task_class"), ({"evidence": "hearsay"}, "evidence"), ({"scroe": 1}, "unknown key")],
)
def test_a_wrong_row_names_its_field(change: dict[str, object], match: str) -> None:
    row = {
        "strategy": "fp8",
        "task": "T",
        "task_class": "code",
        "metric": "m",
        "value": 1.0,
        "baseline": 2.0,
        "model": "M",
    }
    with pytest.raises(InvalidSpec, match=match):
        validate(QualityTable, {"source": "S", "rows": [{**row, **change}]}, "f.yaml")


def test_a_line_holds_every_mark() -> None:
    one = note(40.0, query="aware", reasoning=True, setting="4k", evidence="secondary", interpolated_between=("a", "b"))
    for words in ("T score 40 against 90", "reasoning", "query-aware", "thinking", "4k", "secondary, interpolated"):
        assert words in one.line
    assert "at most 40 against unknown" in note(40.0, bound="at most", baseline=None).line
    assert Quality().scores is Quality().task_classes is None
    assert Quality(notes=(one, note(1.0, task_class="code"))).task_classes == "code; reasoning"
