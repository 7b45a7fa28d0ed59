"""The simulator's scores in numpy and the kernels' references in torch, written apart, agree within one tolerance."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="kernels need torch (the kernels extra)")
pytest.importorskip("triton", reason="kernels need triton (the kernels extra)")

from kernels.decode_attention.batch import DecodeBatch  # noqa: E402
from kernels.score.batch import CORRECTNESS_BATCHES  # noqa: E402
from kernels.score.expected_attention.cases import NUM_SINKS, ExpectedAttention  # noqa: E402
from kernels.score.keydiff.cases import KeyDiff  # noqa: E402
from kernels.score.knorm.cases import Knorm  # noqa: E402
from kernels.score.reference import causal_logits, request_tokens  # noqa: E402
from kernels.score.tova.cases import Tova  # noqa: E402
from kvsim.compression import parse_compression  # noqa: E402
from kvsim.compression.selector import layer_view  # noqa: E402
from kvsim.tensors import KvTensors, LayerKv, Rope  # noqa: E402

TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
"""Of scores: both sides work in fp32 or better from the same 16-bit keys."""
WINDOW = 40
CASES = (*CORRECTNESS_BATCHES, DecodeBatch("one-tile", "bfloat16", 8, 2, 128, 16, (200,), 1))


def _cache(inputs, b, prompt_queries, rope=None):
    """One request as KV tensors; queries as (query heads, queries, dim)."""
    keys, values = (request_tokens(inputs, field, b).numpy() for field in ("key", "value"))
    positions = np.broadcast_to(np.arange(keys.shape[1]), keys.shape[:2]).copy()
    nothing = np.zeros((prompt_queries.shape[0], 0, keys.shape[2]), dtype=np.float32)
    layer = LayerKv(keys, values, positions, nothing, prompt_queries)
    return KvTensors((layer,), rope, inputs["scale"], "drawn")


def _requests(inputs):
    return [b for b, tokens in enumerate(inputs["context_lens"].tolist()) if tokens]


def _scores(name, kv):
    return parse_compression(name).selection.scores(kv, layer_view(kv, 0))


def _agree(mine, reference):
    np.testing.assert_allclose(mine, reference[..., : mine.shape[1]].numpy(), **TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("name", "variant"), [("knorm", Knorm()), ("keydiff", KeyDiff())])
def test_scores_of_keys_alone(case, name, variant):
    inputs = variant.make_inputs(case, seed=3, device="cpu")
    reference = variant.reference(case, inputs)["scores"]
    for b in _requests(inputs):
        nothing = np.zeros((case.num_query_heads, 0, case.head_dim), dtype=np.float32)
        _agree(_scores(name, _cache(inputs, b, nothing)), reference[b])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tova(case):
    inputs = Tova().make_inputs(case, seed=4, device="cpu")
    # The kernel takes the sums of exponentials that attention leaves; here they are those of the same queries and keys.
    inputs["lse"] = torch.full((*inputs["lse"].shape[:2], 1), -torch.inf)
    for b in _requests(inputs):
        logits = causal_logits(inputs["query"][b], request_tokens(inputs, "key", b), inputs["scale"])[:, :, 0]
        inputs["lse"][b, :, 0] = logits.logsumexp(-1).flatten() / np.log(2)
    reference = Tova().reference(case, inputs)["scores"]
    for b in _requests(inputs):
        query = inputs["query"][b].float().numpy().swapaxes(0, 1)
        _agree(_scores("tova", _cache(inputs, b, query)), reference[b].expand(case.num_kv_heads, -1))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("has_rope", [False, True])
def test_expected_attention(case, has_rope):
    """The kernel takes mean and covariance as they are after the averaged rotation; kvsim makes them of queries."""
    inputs = ExpectedAttention().make_inputs(case, seed=5, device="cpu")
    rope = Rope.plain(case.head_dim, 10_000.0) if has_rope else None
    rng = np.random.default_rng(6)
    selection = parse_compression("expected_attention").selection
    assert selection.n_sink == NUM_SINKS
    for b in _requests(inputs):
        queries = rng.standard_normal((case.num_query_heads, WINDOW, case.head_dim)).astype(np.float32)
        kv = _cache(inputs, b, queries, rope)
        mine = _scores("expected_attention", kv)
        request = {**inputs, "fields": inputs["fields"]}
        if kv.layers[0].num_tokens > NUM_SINKS:
            future = selection.future_queries(kv, 0)
            shape = inputs["query_mean"].shape
            request["query_mean"] = torch.from_numpy(future.mean).expand(shape)
            request["query_covariance"] = torch.from_numpy(future.covariance).expand(*shape, case.head_dim)
        _agree(mine, ExpectedAttention().reference(case, request)["scores"][b])


def test_expected_attention_without_covariances_is_that_of_the_mean_query():
    case = CASES[-1]
    inputs = ExpectedAttention().make_inputs(case, seed=7, device="cpu")
    inputs["query_covariance"] = torch.zeros_like(inputs["query_covariance"])
    rng = np.random.default_rng(8)
    queries = rng.standard_normal((case.num_query_heads, WINDOW, case.head_dim)).astype(np.float32)
    kv = replace(_cache(inputs, 0, queries), rope=Rope.plain(case.head_dim, 500_000.0))
    future = parse_compression("expected_attention").selection.future_queries(kv, 0)
    inputs["query_mean"] = torch.from_numpy(future.mean)[None]
    mine = _scores("expected_attention(use_covariance=false)", kv)
    _agree(mine, ExpectedAttention().reference(case, inputs)["scores"][0])
