"""Laws of the scores: what must hold whatever the numbers are."""

import math

import pytest

torch = pytest.importorskip("torch", reason="kernels need torch (the kernels extra)")
pytest.importorskip("triton", reason="kernels need triton (the kernels extra)")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from kernels.contract import TARGETS  # noqa: E402
from kernels.decode_attention.batch import DecodeBatch  # noqa: E402
from kernels.formats.page_bounds import page_bounds, page_bounds_layout  # noqa: E402
from kernels.harness.check import run  # noqa: E402
from kernels.score.expected_attention.reference import expected_logits  # noqa: E402
from kernels.score.h2o.cases import H2OPrefill, H2OStep  # noqa: E402
from kernels.score.infokv.cases import CANDIDATES, LogitRows, MixedScores, TopKEntropy  # noqa: E402
from kernels.score.infokv.reference import top_k_entropy  # noqa: E402
from kernels.score.keydiff.cases import KeyDiff  # noqa: E402
from kernels.score.knorm.cases import Knorm  # noqa: E402
from kernels.score.quest.cases import BoundsBatch, QuestBounds, QuestScores  # noqa: E402
from kernels.score.quest.reference import used_rows  # noqa: E402
from kernels.score.reference import causal_logits, request_tokens  # noqa: E402
from kernels.score.snapkv.cases import SnapKV, SnapKVBatch  # noqa: E402
from kernels.score.snapkv.reference import pool_scores  # noqa: E402
from kernels.score.tova.cases import Tova  # noqa: E402

# Triton 3.6's interpreter turns one-element arrays into loop bounds.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
few_examples = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def scores_of(variant, case, inputs, target):
    return run(variant, case, inputs, variant.configs(target, case)[0])


def row_sums(inputs, query, b):
    """Give the log2-sum-exp2 of the causal logits of a request's newest queries, (num_kv_heads, group, queries)."""
    logits = causal_logits(query, request_tokens(inputs, "key", b), inputs["scale"])
    return logits.logsumexp(-1) * math.log2(math.e)


def exact_prompt_sums(case, inputs):
    """Replace the drawn row sums of a prompt by those of its attention."""
    for b, tokens in enumerate(case.context_lens):
        sums = row_sums(inputs, inputs["query"][b, :tokens], b)
        inputs["lse"][b, :tokens] = sums.permute(2, 0, 1).flatten(1)


@few_examples
@given(lens=st.lists(st.integers(1, 70), min_size=1, max_size=2), group=st.integers(1, 5), seed=st.integers(0, 99))
def test_h2o_columns_of_a_prompt_add_up_to_its_queries(kernel_device, kernel_target, lens, group, seed):
    case = DecodeBatch("law", "float16", 2 * group, 2, 32, 16, tuple(lens))
    variant = H2OPrefill()
    inputs = variant.make_inputs(case, seed=seed, device=kernel_device)
    exact_prompt_sums(case, inputs)
    scores = scores_of(variant, case, inputs, kernel_target)["scores"]
    for b, tokens in enumerate(lens):
        torch.testing.assert_close(
            scores[b, :, :tokens].sum(-1), torch.full_like(scores[b, :, 0], tokens * group), rtol=1e-3, atol=0
        )


def test_an_h2o_step_adds_one_per_query_head_and_equals_the_prompt_with_one_more_token(kernel_device, kernel_target):
    case = DecodeBatch("law", "float16", 6, 2, 64, 16, (33, 1))
    step, prefill = H2OStep(), H2OPrefill()
    inputs = step.make_inputs(case, seed=3, device=kernel_device)
    inputs["lse"] = torch.stack([row_sums(inputs, inputs["query"][b], b).reshape(-1, 1) for b in range(2)])
    before = inputs["scores"].clone()
    after = scores_of(step, case, inputs, kernel_target)["scores"]
    added = (after - before).sum(-1)
    torch.testing.assert_close(added, torch.full_like(added, case.group), rtol=1e-3, atol=0)

    whole = prefill.make_inputs(case, seed=3, device=kernel_device)
    whole["query"][0, 32] = inputs["query"][0, 0]
    exact_prompt_sums(case, whole)
    full = scores_of(prefill, case, whole, kernel_target)["scores"]
    shorter = DecodeBatch("law", "float16", 6, 2, 64, 16, (32, 1))
    part = {**whole, "query": whole["query"][:, :32], "lse": whole["lse"][:, :32].contiguous()}
    part["context_lens"] = torch.tensor([32, 1], dtype=torch.int32, device=kernel_device)
    start = scores_of(prefill, shorter, part, kernel_target)["scores"]
    inputs["scores"] = torch.nn.functional.pad(start.nan_to_num(neginf=0.0), (0, 1))
    stepped = scores_of(step, case, inputs, kernel_target)["scores"]
    torch.testing.assert_close(stepped[0], full[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("pooling", ["average", "maximum"])
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
def test_snapkv_pooling_keeps_a_constant(kernel_device, kernel_target, pooling, kernel_size):
    case = SnapKVBatch("law", "float16", 2, 1, 32, 16, (60,), 1, window=4, kernel_size=kernel_size, pooling=pooling)
    variant = SnapKV()
    inputs = variant.make_inputs(case, seed=1, device=kernel_device)
    # Equal keys receive equal attention: 1/60 from the newest query, 1/57 from the first of the window.
    inputs["fields"]["key"][:] = 0.5
    score = scores_of(variant, case, inputs, kernel_target)["scores"][0, 0]
    edge = kernel_size // 2
    expected = sum(1 / (57 + query) for query in range(4)) / 4
    torch.testing.assert_close(score[edge : 56 - edge], torch.full_like(score[edge : 56 - edge], expected))
    assert score[56:].isinf().all()


@few_examples
@given(
    scores=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30),
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    pooling=st.sampled_from(["average", "maximum"]),
)
def test_pooling_stays_between_the_extremes_and_maxima_dominate(scores, kernel_size, pooling):
    row = torch.tensor([scores])
    pooled = pool_scores(row, kernel_size, pooling)
    assert pooled.shape == row.shape
    assert pooled.max() <= row.max() * (1 + 1e-6)
    assert pooled.min() >= 0
    if pooling == "maximum":
        assert (pooled >= row).all()


def test_tova_scores_and_the_newest_token_share_a_query_s_attention(kernel_device, kernel_target):
    case = DecodeBatch("law", "float16", 8, 2, 64, 16, (50,))
    variant = Tova()
    inputs = variant.make_inputs(case, seed=5, device=kernel_device)
    inputs["lse"] = row_sums(inputs, inputs["query"][0], 0).reshape(1, -1, 1)
    score = scores_of(variant, case, inputs, kernel_target)["scores"][0, 0]
    assert score[-1] == math.inf
    newest = causal_logits(inputs["query"][0], request_tokens(inputs, "key", 0), inputs["scale"]).softmax(-1)[..., -1]
    assert score[:-1].sum().item() == pytest.approx(1 - newest.mean().item(), rel=1e-3)


@pytest.mark.parametrize("variant", [Knorm(), KeyDiff()], ids=lambda variant: variant.name)
def test_key_scores_move_with_their_keys(kernel_device, kernel_target, variant):
    case = DecodeBatch("law", "float16", 2, 2, 64, 16, (48,))
    inputs = variant.make_inputs(case, seed=2, device=kernel_device)
    before = scores_of(variant, case, inputs, kernel_target)["scores"]
    order = torch.randperm(48, generator=torch.Generator().manual_seed(4)).to(kernel_device)
    key, blocks = inputs["fields"]["key"], inputs["block_table"][0].long()
    key[blocks] = key[blocks].flatten(0, 1)[order].view(3, 16, 2, 64)
    after = scores_of(variant, case, inputs, kernel_target)["scores"]
    torch.testing.assert_close(after, before[:, :, order], rtol=1e-5, atol=1e-6)


def test_keydiff_does_not_see_the_length_of_keys(kernel_device, kernel_target):
    case, variant = DecodeBatch("law", "float32", 2, 2, 64, 16, (40,)), KeyDiff()
    inputs = variant.make_inputs(case, seed=2, device=kernel_device)
    before = scores_of(variant, case, inputs, kernel_target)["scores"]
    inputs["fields"]["key"].mul_(torch.rand(1, 16, 1, 1, device=kernel_device) + 0.5)
    torch.testing.assert_close(scores_of(variant, case, inputs, kernel_target)["scores"], before, rtol=1e-4, atol=1e-5)
    assert before.abs().max() <= 1 + 1e-6


@few_examples
@given(tokens=st.integers(1, 80), group=st.integers(1, 4), page_size=st.sampled_from([4, 16]), seed=st.integers(0, 99))
def test_quest_bounds_every_logit_of_a_page(kernel_device, kernel_target, tokens, group, page_size, seed):
    built = BoundsBatch("law", "float16", group, 1, 32, page_size, (tokens,), new_lens=(tokens,))
    inputs = QuestBounds().make_inputs(built, seed=seed, device=kernel_device)
    inputs["bounds"] = scores_of(QuestBounds(), built, inputs, kernel_target)
    generator = torch.Generator(device=kernel_device).manual_seed(seed)
    query = torch.randn(1, group, 32, generator=generator, device=kernel_device).half()
    scores = scores_of(QuestScores(), built, {**inputs, "query": query}, kernel_target)["scores"][0, 0]
    logits = torch.einsum("gd,td->gt", query[0].float(), request_tokens(inputs, "key", 0)[0]) * inputs["scale"]
    for page, bound in enumerate(scores):
        assert bound >= logits[:, page * page_size : (page + 1) * page_size].max() - 1e-5
    assert scores[-1] == math.inf


@few_examples
@given(parts=st.lists(st.integers(1, 40), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_page_bounds_by_steps_equal_those_of_the_whole(kernel_device, kernel_target, parts, seed):
    variant = QuestBounds()
    whole = BoundsBatch("law", "bfloat16", 2, 2, 32, 16, (sum(parts),), new_lens=(sum(parts),))
    inputs = variant.make_inputs(whole, seed=seed, device=kernel_device)
    at_once = scores_of(variant, whole, inputs, kernel_target)
    bounds, tokens = inputs["bounds"], 0
    for new in parts:
        tokens += new
        case = BoundsBatch("law", "bfloat16", 2, 2, 32, 16, (tokens,), new_lens=(new,))
        lens = {"context_lens": tokens, "new_lens": new}
        step = {name: torch.tensor([value], dtype=torch.int32, device=kernel_device) for name, value in lens.items()}
        bounds = scores_of(variant, case, {**inputs, **step, "bounds": bounds}, kernel_target)
    held = used_rows(inputs["block_table"], (sum(parts),), len(bounds["key_min"]), 16).any(1)
    for name, bound in at_once.items():
        assert torch.equal(bounds[name][held], bound[held])


@pytest.mark.parametrize(("heads", "head_dim"), [(8, 128), (4, 64)])
def test_page_bounds_take_the_bytes_that_quest_is_charged(heads, head_dim):
    from kvsim.compression.selection.quest import Quest

    layout = page_bounds_layout(num_kv_heads=heads, head_dim=head_dim, dtype=torch.bfloat16)

    class Group:
        shares_kv, num_kv_heads, k_head_dim = False, heads, head_dim

    quest = Quest()
    assert layout.page_bytes / quest.page_size == quest.scan_bytes_per_token(Group(), 2.0)


def test_page_bounds_are_exact():
    keys = torch.randn(3, 16, 2, 8).bfloat16()
    bounds = page_bounds(keys, torch.ones(3, 16, dtype=torch.bool))
    assert (bounds["key_min"][:, None] <= keys).all()
    assert (bounds["key_max"][:, None] >= keys).all()
    assert (bounds["key_max"][:, None] == keys).any(1).all()


def test_expected_logits_equal_the_mean_over_drawn_queries():
    generator = torch.Generator().manual_seed(7)
    factor = 0.6 * torch.randn(2, 16, 16, generator=generator, dtype=torch.float64)
    mean = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    keys = torch.randn(1, 5, 16, generator=generator, dtype=torch.float64)
    scale, draws = 0.25, 200_000
    logits = expected_logits(mean, factor @ factor.mT, keys.float(), scale)[0]
    noise = torch.randn(draws, 2, 16, generator=generator, dtype=torch.float64)
    queries = mean + torch.einsum("hij,nhj->nhi", factor, noise)
    weights = (torch.einsum("nhd,td->nht", queries, keys[0]) * scale).exp()
    standard_error = weights.std(0) / math.sqrt(draws)
    assert ((weights.mean(0) - logits.exp()).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_entropy_of_equal_logits_is_that_of_a_uniform_choice(kernel_device, kernel_target, dtype):
    case, variant = LogitRows("law", dtype, 1, 2500, "equal"), TopKEntropy()
    inputs = variant.make_inputs(case, seed=1, device=kernel_device)
    entropy = scores_of(variant, case, inputs, kernel_target)["entropy"]
    assert entropy.item() == pytest.approx(math.log(CANDIDATES), rel=1e-6)


@few_examples
@given(vocabulary=st.integers(1, 6000), levels=st.integers(1, 400), shift=st.integers(-50, 50), seed=st.integers(0, 99))
def test_entropy_is_exact_among_ties_and_does_not_move_with_a_shift(
    kernel_device, kernel_target, vocabulary, levels, shift, seed
):
    generator = torch.Generator(device=kernel_device).manual_seed(seed)
    logits = torch.randint(0, levels, (1, vocabulary), generator=generator, device=kernel_device) / 32
    case, variant = LogitRows("law", "float32", 1, vocabulary), TopKEntropy()
    entropy = scores_of(variant, case, {"logits": logits + shift}, kernel_target)["entropy"]
    torch.testing.assert_close(entropy, top_k_entropy(logits, CANDIDATES), rtol=1e-5, atol=1e-5)
    assert -1e-5 <= entropy.item() <= math.log(CANDIDATES) + 1e-5


def test_infokv_shares_add_up_to_one(kernel_device, kernel_target):
    case, variant = DecodeBatch("law", "float32", 2, 2, 64, 16, (700, 33), 2), MixedScores()
    inputs = variant.make_inputs(case, seed=1, device=kernel_device)
    inputs["attention"] = torch.zeros_like(inputs["attention"])
    scores = scores_of(variant, case, inputs, kernel_target)["scores"]
    for b, tokens in enumerate(case.context_lens):
        torch.testing.assert_close(scores[b, :, :tokens].sum(-1), torch.full((2,), 0.1, device=kernel_device))


@pytest.mark.parametrize(
    ("variant", "name", "change", "rule"),
    [
        (Knorm(), "block_table", lambda table: table.long(), "int32"),
        (Tova(), "lse", lambda lse: lse[..., :3].contiguous(), "power of two"),
        (H2OPrefill(), "query", lambda query: query.float(), "one dtype"),
        (QuestScores(), "query", lambda query: query[:, :1], "query must be"),
        (SnapKV(), "query", lambda query: query[:, :1], "window"),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else None,
)
def test_a_plan_names_the_rule_that_is_broken(kernel_device, kernel_target, variant, name, change, rule):
    case = next(case for case in variant.correctness_cases if case.dtype == "float16")
    inputs = variant.make_inputs(case, seed=1, device=kernel_device)
    inputs[name] = change(inputs[name])
    config = variant.configs(kernel_target, case)[0]
    buffers = variant.allocate(case, inputs, config)
    with pytest.raises(ValueError, match=rule):
        variant.plan(case, inputs, buffers, config)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_a_tiling_for_every_case(target):
    for variant in (Knorm(), Tova(), H2OStep(), H2OPrefill(), SnapKV(), QuestScores(), QuestBounds(), TopKEntropy()):
        for case in (*variant.correctness_cases, *variant.timing_cases):
            assert variant.configs(target, case)
            assert variant.traffic(case).read_bytes >= 0
