"""The model reads a cache as it reads the text, and by the conventions of kvsim.tensors."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the small model needs torch")

from kvsim.compression import parse_compression  # noqa: E402
from kvsim.quality.small_model.architecture import Shape, SmallTransformer, rotate  # noqa: E402
from kvsim.quality.small_model.caches import Prompts, answer, calibration_caches, prefill  # noqa: E402
from kvsim.quality.small_model.evaluation import evaluate, measured_batch, uncompressed_logits  # noqa: E402
from kvsim.quality.small_model.tasks import TASKS, generate  # noqa: E402
from kvsim.quality.store import fit_strategy  # noqa: E402
from kvsim.tensors import LayerKv, Rope, attend  # noqa: E402

COUNT = 3
SEEN = [False, True]


def _prompts(model: SmallTransformer, task: str, *, seen: bool = False) -> Prompts:
    return prefill(model, measured_batch(task, COUNT, 96), sees_question=seen)


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("task", sorted(TASKS))
def test_with_cache_equals_without(model: SmallTransformer, task: str, seen: bool) -> None:
    prompts = _prompts(model, task, seen=seen)
    tokens = torch.from_numpy(prompts.batch.tokens[:, :-1])
    whole = model(tokens, round_kv=True).logits[:, prompts.start :]
    # K and V are rounded to bf16: sums in another order can round to the neighbouring value.
    assert torch.allclose(uncompressed_logits(model, prompts), whole, atol=5e-3)


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("task", sorted(TASKS))
def test_native_is_exactly_uncompressed(model: SmallTransformer, task: str, seen: bool) -> None:
    prompts = _prompts(model, task, seen=seen)
    reference = uncompressed_logits(model, prompts)
    outcome = evaluate(model, prompts, reference, fit_strategy(parse_compression("native")))
    assert (outcome.kl_nats == 0).all()
    assert (outcome.top1_agreement == 1).all()
    assert outcome.bits_per_element == 16


def test_attention_is_that_of_kvsim_tensors(model: SmallTransformer) -> None:
    """One layer's output by torch and by numpy, queries and keys after RoPE, grouped alike."""
    prompts = _prompts(model, "recall")
    _, later = answer(model, prompts, prompts.uncompressed())
    kv = prompts.sequence(0, later_queries=later)
    layer = kv.layers[0]
    mine = attend(layer, kv.attention_scale)
    group = layer.queries.shape[0] // layer.num_kv_heads
    keys, values = (torch.from_numpy(part).repeat_interleave(group, dim=0) for part in (layer.keys, layer.values))
    queries = torch.from_numpy(layer.queries)
    theirs = torch.nn.functional.scaled_dot_product_attention(queries, keys, values)
    assert np.allclose(mine.outputs, theirs.numpy(), atol=1e-5)


def test_rope_is_that_of_kvsim_tensors() -> None:
    model = SmallTransformer(Shape("plain"))
    vectors = torch.randn(1, 2, 40, 64)
    mine = rotate(vectors, model.cosine[:40], model.sine[:40])
    rope = Rope.plain(64, model.shape.rope_theta)
    theirs = rope.rotate(vectors.numpy(), np.broadcast_to(np.arange(40), (1, 2, 40)))
    assert np.allclose(mine.numpy(), theirs, atol=2e-5)


def test_queries_before_the_answer_are_the_prompts_own(model: SmallTransformer) -> None:
    """The measured cache shows a method no query that comes after the prompt; a sample for calibration does."""
    prompts = _prompts(model, "recall")
    measured = prompts.sequence(0)
    assert all(layer.queries.shape[1] == 0 for layer in measured.layers)
    heads = model.shape.num_heads * model.shape.layers_per_cache
    assert all(layer.prompt_queries.shape == (heads, 96, 64) for layer in measured.layers)
    sample = calibration_caches(model, [generate("recall", np.random.default_rng(0), 1, 96, 1)])[0]
    assert all(layer.queries.shape[1] > 0 for layer in sample.layers)


def test_a_question_seen_adds_its_tokens_to_the_cache(model: SmallTransformer) -> None:
    unseen, seen = _prompts(model, "recall"), _prompts(model, "recall", seen=True)
    assert unseen.prompt_tokens == unseen.start == 96
    assert (seen.prompt_tokens, seen.start) == (98, 97)


def test_a_cache_of_zeros_changes_the_answers(model: SmallTransformer) -> None:
    prompts = _prompts(model, "copy")
    reference = uncompressed_logits(model, prompts)
    past = [
        type(one)(torch.zeros_like(one.keys), torch.zeros_like(one.values), one.visible, one.raw_key)
        for one in prompts.uncompressed()
    ]
    logits, _ = answer(model, prompts, past)
    assert not torch.allclose(logits, reference, atol=1e-2)


def test_entries_hidden_are_not_read(model: SmallTransformer) -> None:
    """Whatever stands in an entry that is not visible, the answer is the same."""
    prompts = _prompts(model, "copy", seen=True)
    past = prompts.uncompressed()
    spoiled = []
    for one in past:
        keys = one.keys.clone()
        keys[:, :, prompts.start :] = 50.0
        spoiled.append(type(one)(keys, one.values, one.visible, one.raw_key))
    assert torch.equal(answer(model, prompts, spoiled)[0], answer(model, prompts, past)[0])


def test_layers_that_share_a_cache_hold_half() -> None:
    assert Shape("smeared-cla2").num_caches == 2
    layer: LayerKv
    model = SmallTransformer(Shape("smeared-cla2")).eval()
    for layer in prefill(model, measured_batch("needle", 1, 64)).sequence(0).layers:
        assert layer.prompt_queries.shape[0] == 8
