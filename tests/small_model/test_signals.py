"""Signals of a prompt are what the model really did, and are taken only where somebody asks."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the small model needs torch")

from kvsim.quality.small_model.architecture import PastKv, SmallTransformer  # noqa: E402
from kvsim.quality.small_model.caches import Prompts, calibration_caches, prefill, with_signals  # noqa: E402
from kvsim.quality.small_model.evaluation import measured_batch  # noqa: E402
from kvsim.quality.small_model.signals import by_cache  # noqa: E402
from kvsim.quality.small_model.tasks import ASK  # noqa: E402

TOKENS = 64


def _prompts(model: SmallTransformer, *, seen: bool = False) -> Prompts:
    return prefill(model, measured_batch("recall", 2, TOKENS), sees_question=seen)


def test_nothing_is_taken_unless_asked(model: SmallTransformer) -> None:
    prompts = _prompts(model)
    assert with_signals(model, prompts, ()) is prompts
    untaken = prompts.sequence(0).signals
    assert untaken.hidden is None
    assert untaken.repeat_queries is None
    only = with_signals(model, prompts, ("hidden",)).sequence(0).signals
    assert only.hidden is not None
    assert only.repeat_queries is None


@pytest.mark.parametrize("seen", [False, True])
def test_hidden_is_what_keys_and_values_are_made_of(model: SmallTransformer, seen: bool) -> None:
    prompts = with_signals(model, _prompts(model, seen=seen), ("hidden",))
    kv = prompts.sequence(1)
    makers = [block.attention for block in model.blocks if block.attention.makes_kv]
    assert kv.signals.hidden is not None
    assert len(kv.signals.hidden) == len(makers) == kv.num_layers
    for attention, hidden, layer in zip(makers, kv.signals.hidden, kv.layers, strict=True):
        assert hidden.shape == (prompts.prompt_tokens, model.shape.width)
        values = attention.key_value(torch.from_numpy(hidden)).chunk(2, dim=-1)[1]
        heads = values.unflatten(-1, (model.shape.num_kv_heads, -1)).transpose(0, 1).numpy()
        # Both are rounded to bf16.
        assert np.abs(heads - layer.values).max() < 0.02 * np.abs(layer.values).max()


@pytest.mark.parametrize("seen", [False, True])
def test_repeat_queries_are_of_a_second_reading_of_the_cache(model: SmallTransformer, seen: bool) -> None:
    """Read the prompt into a cache, then the prompt again with that cache: the same queries and keys."""
    prompts = with_signals(model, _prompts(model, seen=seen), ("repeat_queries",))
    tokens = torch.from_numpy(prompts.batch.tokens[:, : prompts.prompt_tokens])
    first = model(tokens, round_kv=True)
    past = tuple(PastKv(new.keys, new.values, raw_key=new.last_raw_key) for new in first.caches)
    again = tokens.clone()
    again[:, 0] = ASK
    second = model(again, past, prompts.prompt_tokens, tokens[:, -1:], round_kv=True)
    for row in range(prompts.count):
        signals = prompts.sequence(row).signals
        assert signals.repeat_queries is not None
        assert signals.repeat_keys is not None
        for mine, theirs in zip(signals.repeat_queries, by_cache(second, model.shape), strict=True):
            assert np.allclose(mine, theirs[row].numpy(), atol=0.03, rtol=0.01)
        for mine, new in zip(signals.repeat_keys, second.caches, strict=True):
            assert np.allclose(mine, new.keys[row].numpy(), atol=0.03, rtol=0.01)
    # They are not those of the first reading.
    assert all((prompts.queries[index][0].float().numpy() != one).any() for index, one in
               enumerate(signals.repeat_queries))  # fmt: skip


def test_calibration_samples_have_them_too(model: SmallTransformer) -> None:
    batch = measured_batch("copy", 1, TOKENS)
    (sample,) = calibration_caches(model, [batch], ("hidden", "repeat_queries"))
    assert sample.signals.hidden is not None
    assert sample.signals.repeat_queries is not None
    assert sample.signals.repeat_queries[0].shape[1] == TOKENS
