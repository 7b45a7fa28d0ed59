"""Compression during decode, priced: the sawtooth, its cuts and what they cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.compression import parse_compression, stored_bytes
from kvsim.compression.base import LayerView
from kvsim.compression.selection.base import acts_on
from kvsim.compression.selection.cuts import CutsWhileDecoding, cut_pulses, first_cut, sawtooth
from kvsim.errors import InvalidSpec
from kvsim.specs.model import ModelSpec

TEETH = given(start=st.integers(0, 60), target=st.integers(1, 50), interval=st.integers(1, 20))


def played(start: int, target: int, interval: int, steps: int) -> list[tuple[int, int, bool]]:
    """Per step: (tokens that it reads, tokens that are left, whether it ends with a cut), token by token."""
    held, out = start, []
    for step in range(1, steps + 1):
        held += 1
        read = held
        cuts = step % interval == 0 and held > target
        held = target if cuts else held
        out.append((read, held, cuts))
    return out


@TEETH
def test_the_sawtooth_is_what_happens_token_by_token(start: int, target: int, interval: int) -> None:
    curve, pulses = sawtooth(start, target, interval), cut_pulses(start, target, interval)
    assert curve(0) == start
    for step, (read, _, cuts) in enumerate(played(start, target, interval, 200), start=1):
        assert curve(step) == read
        assert pulses(step) == int(cuts)


@TEETH
def test_never_above_target_and_interval_once_cut(start: int, target: int, interval: int) -> None:
    curve, first = sawtooth(start, target, interval), first_cut(start, target, interval)
    assert max(curve(step) for step in range(first + 1, first + 300)) == target + interval
    assert max(curve(step) for step in range(300)) <= max(start, target) + interval
    assert min(curve(step) for step in range(first + 1, first + 300)) == target + 1


@TEETH
def test_a_period_is_the_same_wherever_it_lies(start: int, target: int, interval: int) -> None:
    curve, first = sawtooth(start, target, interval), first_cut(start, target, interval)
    far = first + 1_000_000_007 * interval
    assert [curve(first + 1 + step) for step in range(interval)] == [curve(far + 1 + step) for step in range(interval)]
    if interval > 1:
        assert curve.next_breakpoint(far) == far + 1
        assert curve.segment_at(far + 1) == (far + 1, target + 1, 1)


# --- names ----------------------------------------------------------------------------------------------------------


def test_published_names() -> None:
    rkv = parse_compression("R-KV").selection
    assert isinstance(rkv, CutsWhileDecoding)
    assert (rkv.compression_interval, rkv.decode_target(10)) == (128, 1024)
    infokv = parse_compression("infokv:0.6").selection
    assert isinstance(infokv, CutsWhileDecoding)
    assert (infokv.compression_interval, infokv.decode_target(1000)) == (1024, 400)
    press = parse_compression("PrefillDecodingPress:1024(prefilling=SnapKVPress,decoding=rkv)")
    assert press.name == "prefill_decoding:1024(decoding=rkv)"
    assert parse_compression("DecodingPress").name == "decoding"
    assert parse_compression("decoding:512(decoding=rkv)").selection.resident_tokens(4000, _layer())(0) == 4000


def _layer() -> LayerView:
    from kvsim.compression.selector import layer_view
    from tests.quality.conftest import noise_cache

    return layer_view(noise_cache(tokens=2, layers=1), 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rkv:8", "budget_tokens 8 must be more than window_size 8"),
        ("prefill_decoding:1024(decoding=snap)", "unknown scorer 'snap'; did you mean 'snapkv'"),
        ("prefill_decoding:32", "budget_tokens 32 is smaller than window_size 64"),
        ("decoding:1024(compression_ratio=0.5)", "needs a scorer as prefilling"),
        ("prefill_decoding:0.5", "takes a whole number of tokens"),
        ("rkv(compression_interval=0)", "compression_interval"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        parse_compression(name)


def test_a_share_of_the_prompt_and_a_target_go_together() -> None:
    selection = parse_compression("prefill_decoding:100(compression_ratio=0.75)").selection
    assert selection.resident_tokens(1000, _layer())(0) == 250
    assert selection.resident_tokens(1000, _layer())(513) == 101


# --- price ----------------------------------------------------------------------------------------------------------


def _views(model: ModelSpec) -> list[LayerView]:
    return [LayerView(index, model.num_layers, group) for group in model.groups for index in group.layers]


def test_the_lm_head_is_charged_once_per_prompt_token(models: dict[str, ModelSpec]) -> None:
    """2 d |V| per token but the last, whose logits are made anyway, over all layers together."""
    for name in ("llama-3.1-8b", "sliding", "shared"):
        model = models[name]
        acted = [view for view in _views(model) if acts_on(view.group) and not view.group.shares_kv]
        for strategy in (
            "infokv",
            "infokv:100000",
            "prefill_decoding:1024(decoding=infokv)",
            "decoding(decoding=infokv)",
        ):
            selection = parse_compression(strategy).selection
            calls = [call for view in acted for call in selection.prefill_ops(3000, view, model)]
            flops = sum(call.work.flops for call in calls if call.name == "prompt_logits")
            launches = sum(call.work.launches for call in calls if call.name == "prompt_logits")
            assert flops == pytest.approx(2999 * 2 * model.hidden_size * model.vocab_size)
            assert launches == pytest.approx(1.0)
            cuts = [call for view in acted for call in selection.cut_ops(3000, view, model)]
            assert not any(call.name == "prompt_logits" for call in cuts)
    plain = parse_compression("infokv(alpha=1)").selection
    assert not any(call.name == "prompt_logits" for call in plain.prefill_ops(3000, acted[0], model))


def test_llama_pays_a_gigaflop_per_prompt_token(models: dict[str, ModelSpec]) -> None:
    """1.05 GFLOP for Llama-3.1-8B, as published in a note on the method."""
    model = models["llama-3.1-8b"]
    selection = parse_compression("infokv").selection
    calls = [call for view in _views(model) for call in selection.prefill_ops(1001, view, model)]
    flops = sum(call.work.flops for call in calls if call.name == "prompt_logits")
    assert flops / 1000 == pytest.approx(1.05e9, rel=0.01)


def test_the_prefill_peak_is_not_reduced() -> None:
    for name in ("infokv", "rkv", "prefill_decoding"):
        assert parse_compression(name).selection.prefill_resident_tokens(9000, _layer()) == 9000


def test_a_cut_costs_what_its_published_order_says(models: dict[str, ModelSpec]) -> None:
    """R-KV: the redundancy grows with the square of what is held, the importance with alpha times it."""
    model = models["llama-3.1-8b"]
    view = _views(model)[0]

    def flops(budget: int, name: str, **more: object) -> float:
        fields = ",".join(f"{key}={value}" for key, value in {"compression_interval": budget, **more}.items())
        calls = parse_compression(f"rkv:{budget}({fields})").selection.cut_ops(0, view, model)
        return next(call.work.flops for call in calls if call.name == name)

    assert flops(2048, "key_similarity") == 4 * flops(1024, "key_similarity")
    assert flops(2048, "score_with_window") == 2 * flops(1024, "score_with_window")
    assert flops(1024, "score_with_window", window_size=16) == 2 * flops(1024, "score_with_window")
    assert flops(1024, "key_similarity") == 2 * 2048**2 * 128 * 8


def test_signals_and_newest_queries_are_held(models: dict[str, ModelSpec]) -> None:
    model = models["llama-3.1-8b"]
    assert stored_bytes(parse_compression("infokv:0.5"), model, 1000, 0) == 500 * 32 * (2 * 8 * 128 * 2 + 8)
    view = _views(model)[0]
    assert parse_compression("rkv").selection.buffer_bytes(view, model) == 8 * 32 * 128 * 2
    assert parse_compression("prefill_decoding").selection.buffer_bytes(view, model) == 64 * 32 * 128 * 2
    assert parse_compression("rkv:0").selection.buffer_bytes(view, model) == 0.0
