"""Published scores: sourced, matched exactly, unknown otherwise."""

from __future__ import annotations

import pytest

from kvsim.compression import STRATEGIES, Compression, parse_compression
from kvsim.quality import published_notes, published_quality


def test_native_is_the_baseline() -> None:
    quality = published_quality(Compression())
    assert (quality.status, quality.notes) == ("baseline", ())


@pytest.mark.parametrize("name", ["snapkv:0.33", "snapkv+fp8", "quest", "low_rank", "int8_per_token_head"])
def test_unpublished_is_unknown_and_carries_no_number(name: str) -> None:
    quality = published_quality(parse_compression(name))
    assert (quality.status, quality.notes) == ("unknown", ())


@pytest.mark.parametrize(
    ("name", "task", "model", "value", "baseline"),
    [
        ("turboquant_3bit_nc", "AIME25", "Qwen3-30B-A3B-Thinking", 62.3, 86.3),
        ("turboquant_k8v4", "GPQA-Diamond", "Qwen3-30B-A3B-Thinking", 73.1, 72.8),
        ("fp8", "MRCR", "Qwen3-30B-A3B-Instruct", 43.1, 45.8),
        ("kivi-2", "LongBench PassageRetrieval", "Mistral-7B-Instruct", 80.83, 89.33),
        ("mxfp4", "AIME25 (blocks of 16, not 32)", "gpt-oss-120b", 35.3, 75.3),
        ("pyramidkv:128", "LongBench", "Llama-3-8B-Instruct", 37.25, 41.46),
    ],
)
def test_published_scores(name: str, task: str, model: str, value: float, baseline: float) -> None:
    quality = published_quality(parse_compression(name))
    assert quality.status == "published"
    (note,) = (note for note in quality.notes if (note.task, note.model) == (task, model))
    assert (note.value, note.baseline) == (value, baseline)


def test_every_row_has_a_source_and_a_baseline_and_digitised_figures_say_so() -> None:
    for compression, note in published_notes():
        assert note.source
        assert 0 < note.value <= 100
        assert 0 < note.baseline <= 100
        if note.task.startswith("RULER 4k"):
            assert "digitised" in note.source
            assert compression.selection.kind in {"snapkv", "pyramidkv"}


def test_no_row_is_given_twice() -> None:
    keys = [(compression.name, note.task, note.model, note.source) for compression, note in published_notes()]
    assert len(set(keys)) == len(keys)


def test_every_published_strategy_is_spelled_canonically() -> None:
    known = set(STRATEGIES)
    for compression, _ in published_notes():
        assert parse_compression(compression.name) == compression
        assert compression.name.split(":")[0] in known
