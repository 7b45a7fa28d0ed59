"""Laws of the selection path: top-k, compaction, merging, weighted atoms, and attention over what they leave."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="kernels need torch (the kernels extra)")
pytest.importorskip("triton", reason="kernels need triton (the kernels extra)")

from kernels.decode_attention.batch import DecodeBatch  # noqa: E402
from kernels.decode_attention.native.cases import NativeDecodeAttention  # noqa: E402
from kernels.decode_attention.page_sparse.cases import PageSparseBatch, PageSparseDecodeAttention  # noqa: E402
from kernels.decode_attention.ragged_heads.batch import RaggedHeadsBatch, WeightedNative, choose_split  # noqa: E402
from kernels.decode_attention.ragged_heads.cases import (  # noqa: E402
    RaggedHeadsDecodeAttention,
    WeightedRaggedHeadsDecodeAttention,
)
from kernels.harness.check import run  # noqa: E402
from kernels.launches import LaunchConfig  # noqa: E402
from kernels.select.compaction.cases import Compaction, CompactionBatch  # noqa: E402
from kernels.select.compaction.kernel import as_words  # noqa: E402
from kernels.select.merge.cases import Merge, MergeBatch  # noqa: E402
from kernels.select.top_k.cases import TopK, TopKRows  # noqa: E402
from kernels.select.weighted_atoms.cases import AtomsBatch, WeightedAtoms  # noqa: E402

# Triton 3.6's interpreter turns one-element arrays into loop bounds.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
ATTENTION = LaunchConfig(block_n=32, num_warps=4, num_stages=2)
SELECTION = LaunchConfig(block_n=32, num_warps=4, num_stages=2)
TOP_K = LaunchConfig(block_n=128, num_warps=4, num_stages=2)
seeds = st.integers(0, 1 << 30)
few_examples = settings(max_examples=12, deadline=None)


@few_examples
@given(
    rows=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 320)), min_size=1, max_size=3),
    num_levels=st.sampled_from([None, 1, 3]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    num_parts=st.integers(1, 3),
    seed=seeds,
)
def test_top_k_keeps_what_torch_keeps(rows, num_levels, dtype, num_parts, seed, kernel_device):
    row_lens, budgets = zip(*rows, strict=True)
    case = TopKRows("drawn", dtype, row_lens, budgets, num_levels, num_parts)
    inputs = TopK().make_inputs(case, seed=seed, device=kernel_device)
    found = run(TopK(), case, inputs, TOP_K)
    for row, (length, budget) in enumerate(rows):
        kept = min(length, budget)
        assert int(found["kept_lens"][row]) == kept
        indices = found["indices"][row, :kept].long()
        assert (indices.diff() > 0).all()
        assert (found["indices"][row, kept:] == -1).all()
        scores = inputs["scores"][row, :length].float()
        assert torch.equal(scores[indices].sort(descending=True).values, scores.topk(kept).values)
        # Of equal scores the lowest positions: no kept score is later than a dropped one of the same value.
        dropped = torch.ones(length, dtype=torch.bool, device=scores.device)
        dropped[indices] = False
        if dropped.any() and kept:
            least = scores[indices].min()
            first_dropped = (dropped & (scores == least)).nonzero()
            if len(first_dropped):
                assert int(indices[scores[indices] == least].max()) < int(first_dropped[0])


@few_examples
@given(
    row_bytes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    context=st.integers(1, 60),
    kept=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    block_size=st.sampled_from([1, 8, 16]),
    seed=seeds,
)
def test_compaction_preserves_rows_bit_for_bit(row_bytes, context, kept, block_size, seed, kernel_device):
    lens = tuple(min(count, context) for count in kept)
    case = CompactionBatch("drawn", tuple(row_bytes), len(lens), block_size, (context,), (lens,))
    inputs = Compaction().make_inputs(case, seed=seed, device=kernel_device)
    pages = run(Compaction(), case, inputs, SELECTION)["pages"]
    old, new = case.layout(case.num_kv_heads).views(inputs["old_pages"]), case.layout(1).views(pages)
    tables = inputs["tables"]
    for h, count in enumerate(lens):
        token = tables["kept"][0, h, :count].long()
        place = torch.arange(count, device=token.device)
        for name, field in new.items():
            moved = field[tables["new_table"][0, h].long()[place // block_size], place % block_size, 0]
            before = old[name][tables["old_table"][0, 0].long()[token // block_size], token % block_size, h]
            assert torch.equal(moved, before)


def test_compaction_that_keeps_all_is_the_identity(kernel_device):
    case = CompactionBatch("all", (64, 64, 2), 2, 16, (48,), ((48,),), "layer")
    inputs = Compaction().make_inputs(case, seed=3, device=kernel_device)
    inputs["tables"]["new_table"] = inputs["tables"]["old_table"]
    pages = run(Compaction(), case, inputs, SELECTION)["pages"]
    owned = inputs["tables"]["old_table"].flatten().long()
    assert torch.equal(pages[owned], inputs["old_pages"][owned])


@pytest.mark.parametrize(
    ("row_bytes", "word"), [(256, torch.int64), (68, torch.int32), (6, torch.int16), (51, torch.uint8)]
)
def test_rows_are_copied_as_the_widest_words_that_fit(row_bytes, word):
    field = torch.empty(3, 16, 2, row_bytes, dtype=torch.uint8)
    assert as_words(field)[0].dtype == word


@pytest.mark.parametrize("rule", ["counts", "norms"])
def test_merging_nothing_is_the_identity(rule, kernel_device):
    variant = Merge(rule)
    case = MergeBatch("none", "bfloat16", 2, 64, (40,), ((40, 40),))
    inputs = variant.make_inputs(case, seed=5, device=kernel_device)
    found = run(variant, case, inputs, SELECTION)
    assert torch.equal(found["value"], inputs["value"].transpose(1, 2))
    if rule == "counts":
        assert torch.equal(found["key"], inputs["key"].transpose(1, 2))
        assert not found["log_weight"].any()


@settings(max_examples=5, deadline=None)
@given(context=st.integers(2, 70), kept=st.integers(1, 70), seed=seeds)
def test_merging_conserves_tokens_and_their_sum(context, kept, seed, kernel_device):
    variant = Merge("counts")
    case = MergeBatch("drawn", "float32", 1, 32, (context,), ((min(kept, context),),), threshold=-1.0)
    inputs = variant.make_inputs(case, seed=seed, device=kernel_device)
    found = run(variant, case, inputs, SELECTION)
    weight = found["log_weight"].exp()
    assert float(weight.sum()) == pytest.approx(context, rel=1e-5)
    total = (weight[..., None] * found["value"]).sum(2)
    torch.testing.assert_close(total, inputs["value"].sum(1), atol=1e-3, rtol=1e-4)


def test_of_equally_near_survivors_the_first_is_taken(kernel_device):
    variant = Merge("counts")
    case = MergeBatch("ties", "float16", 1, 16, (80,), ((40,),))
    inputs = variant.make_inputs(case, seed=6, device=kernel_device)
    inputs["key"][:] = 1.0
    found = run(variant, case, inputs, SELECTION)
    assert not found["target"].any()
    assert float(found["log_weight"][0, 0, 0].exp()) == pytest.approx(41)


@settings(max_examples=6, deadline=None)
@given(
    lens=st.lists(st.integers(0, 90), min_size=1, max_size=2),
    num_atoms=st.integers(1, 20),
    num_rounds=st.integers(1, 3),
    num_parts=st.integers(1, 3),
    seed=seeds,
)
def test_atoms_share_out_the_tokens_evenly(lens, num_atoms, num_rounds, num_parts, seed, kernel_device):
    variant = WeightedAtoms()
    case = AtomsBatch("drawn", "float32", 32, 16, (tuple(lens),), num_atoms, num_rounds, num_parts)
    inputs = variant.make_inputs(case, seed=seed, device=kernel_device)
    found = run(variant, case, inputs, SELECTION)
    for h, tokens in enumerate(lens):
        atoms = min(tokens, num_atoms)
        weight = found["log_weight"][0, h, :atoms].exp()
        assert float(weight.sum()) == pytest.approx(tokens, rel=1e-5)
        if not tokens:
            continue
        assert float(weight.max() - weight.min()) < 1.001
        sizes = torch.bincount(found["assignment"][0, h, :tokens].long(), minlength=num_atoms)
        torch.testing.assert_close(weight, sizes[:atoms].float())
        total = (weight[:, None] * found["atom_value"][0, h, :atoms]).sum(0)
        torch.testing.assert_close(total, inputs["value"][0, :tokens, h].sum(0), atol=1e-3, rtol=1e-4)


ORDINARY = DecodeBatch("ordinary", "float16", 6, 3, 64, 16, (70, 70), 2)


def one_head_pools(inputs, num_kv_heads):
    """Give the same cache with a page per block and head: fields, block table and lengths."""
    fields = {name: field.transpose(1, 2).flatten(0, 1)[:, :, None] for name, field in inputs["fields"].items()}
    head = torch.arange(num_kv_heads, dtype=torch.int32, device=inputs["block_table"].device)
    table = inputs["block_table"][:, None] * num_kv_heads + head[:, None]
    lens = inputs["context_lens"][:, None].expand(-1, num_kv_heads).contiguous()
    return inputs | {"fields": fields, "block_table": table, "context_lens": lens}


def test_heads_of_equal_length_attend_as_ever(kernel_device):
    native = NativeDecodeAttention()
    inputs = native.make_inputs(ORDINARY, seed=11, device=kernel_device)
    case = RaggedHeadsBatch("equal", "float16", 6, 3, 64, 16, (), 2, head_lens=((70,) * 3,) * 2)
    ragged = run(RaggedHeadsDecodeAttention(), case, one_head_pools(inputs, 3), ATTENTION)["output"]
    assert torch.equal(ragged, run(native, ORDINARY, inputs, ATTENTION)["output"])


def test_a_weight_stands_for_that_many_tokens(kernel_device):
    # One head: tokens repeated 1 to 5 times, against each token once with the logarithm of its count.
    counts = torch.arange(40) % 5 + 1
    once = RaggedHeadsBatch("once", "float16", 2, 1, 64, 16, (), 2, head_lens=((40,),))
    weighted = WeightedRaggedHeadsDecodeAttention()
    inputs = weighted.make_inputs(once, seed=12, device=kernel_device)
    token = torch.arange(40, device=kernel_device)
    at = (inputs["block_table"][0, 0].long()[token // 16], token % 16)
    inputs["fields"]["log_weight"][(*at, 0, 0)] = counts.log().to(kernel_device)
    output = run(weighted, once, inputs, ATTENTION)["output"]

    total = int(counts.sum())
    often = RaggedHeadsBatch("often", "float16", 2, 1, 64, 16, (), 2, head_lens=((total,),))
    pool = {
        name: torch.zeros(-(-total // 16) * 16, 64, dtype=torch.float16, device=kernel_device)
        for name in ("key", "value")
    }
    for name, rows in pool.items():
        rows[:total] = inputs["fields"][name][at][:, 0].repeat_interleave(counts.to(kernel_device), dim=0)
    repeated = inputs | {
        "fields": {name: rows.view(-1, 16, 1, 64) for name, rows in pool.items()},
        "block_table": torch.arange(-(-total // 16), dtype=torch.int32, device=kernel_device)[None, None],
        "context_lens": torch.tensor([[total]], dtype=torch.int32, device=kernel_device),
    }
    expected = run(RaggedHeadsDecodeAttention(), often, repeated, ATTENTION)["output"]
    torch.testing.assert_close(output, expected, atol=2e-3, rtol=2e-3)


def test_a_log_weight_costs_four_bytes_per_token_and_head():
    sizes = {"num_kv_heads": 1, "head_dim": 128, "block_size": 16, "dtype": torch.bfloat16}
    assert WeightedNative().layout(**sizes).page_bytes == 16 * (2 * 128 * 2 + 4)


def test_splits_follow_the_tokens_that_all_heads_keep():
    # 132 multiprocessors, 264 programs: 8 heads of 8,192 tokens make splits of 248 tokens, 33 of them: 64.
    equal = RaggedHeadsBatch("equal", "float16", 8, 8, 128, 16, (), head_lens=((8192,) * 8,))
    assert choose_split(equal, 132, block_n=64) == 64
    # One long head of 64k among short ones is cut as far as allowed, though its programs are then longer.
    unequal = RaggedHeadsBatch("unequal", "float16", 8, 8, 128, 16, (), head_lens=((65536,) + (16,) * 7,))
    assert choose_split(unequal, 132, block_n=64) == 64
    # Enough heads to fill the GPU: only those longer than their share are split.
    many = RaggedHeadsBatch("many", "float16", 8, 8, 128, 16, (), head_lens=((4096,) + (512,) * 7,) * 64)
    assert choose_split(many, 132, block_n=64) == 4


@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_attending_all_pages_is_ordinary_attention(order, kernel_device):
    native = NativeDecodeAttention()
    contexts = (70, 33, 0)
    ordinary = DecodeBatch("ordinary", "float16", 4, 2, 64, 16, contexts, 2)
    inputs = native.make_inputs(ordinary, seed=13, device=kernel_device)
    pages = torch.arange(5, dtype=torch.int32).expand(3, 2, 5)
    if order == "shuffled":
        pages = torch.stack([torch.stack([page[torch.randperm(5)] for page in request]) for request in pages])
    case = PageSparseBatch("all", "float16", 4, 2, 64, 16, contexts, 2, num_selected=5)
    # Request 1 has three pages: the list names two past its end, which hold no token.
    sparse = run(
        PageSparseDecodeAttention(), case, inputs | {"selected_pages": pages.contiguous().to(kernel_device)}, ATTENTION
    )["output"]
    torch.testing.assert_close(sparse, run(native, ordinary, inputs, ATTENTION)["output"], atol=1e-3, rtol=2e-3)


def test_select_compact_attend_equals_attention_over_the_best(kernel_device):
    native = NativeDecodeAttention()
    inputs = native.make_inputs(ORDINARY, seed=14, device=kernel_device)
    budgets = (20, 5, 70, 1, 33, 16)
    rows = TopKRows("scores", "float32", (70,) * 6, budgets, num_parts=1)
    scores = TopK().make_inputs(rows, seed=15, device=kernel_device)
    indices = run(TopK(), rows, scores, TOP_K)["indices"].view(2, 3, 70)

    kept_lens = (budgets[:3], budgets[3:])
    moved = CompactionBatch("kept", (128, 128), 3, 16, (70, 70), kept_lens)
    compaction = Compaction().make_inputs(moved, seed=16, device=kernel_device)
    compaction["old_pages"] = inputs["pages"]
    compaction["tables"] |= {"kept": indices, "old_table": inputs["block_table"][:, None]}
    pages = run(Compaction(), moved, compaction, SELECTION)["pages"]

    ragged = RaggedHeadsDecodeAttention()
    case = RaggedHeadsBatch("kept", "float16", 6, 3, 64, 16, (), 2, head_lens=kept_lens)
    layout = ragged.kv_format.layout(num_kv_heads=1, head_dim=64, block_size=16, dtype=torch.float16)
    attended = inputs | {
        "fields": layout.views(pages),
        "block_table": compaction["tables"]["new_table"],
        "context_lens": compaction["tables"]["kept_lens"],
    }
    output = run(ragged, case, attended, ATTENTION)["output"].float()
    for b in range(2):
        for h in range(3):
            token = indices[b, h, : kept_lens[b][h]].long()
            block = inputs["block_table"][b].long()[token // 16]
            key, value = (inputs["fields"][name][block, token % 16, h].float() for name in ("key", "value"))
            weight = (inputs["query"][b, 2 * h : 2 * h + 2].float() @ key.T * inputs["scale"]).softmax(-1)
            torch.testing.assert_close(output[b, 2 * h : 2 * h + 2], weight @ value, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        (TopK(), lambda i: i | {"row_lens": i["row_lens"].long()}, "int32, one per row"),
        (TopK(), lambda i: i | {"scores": i["scores"].double()}, "fp32, fp16 or bf16"),
        (
            Compaction(),
            lambda i: i | {"tables": i["tables"] | {"kept": i["tables"]["kept"].long()}},
            "must be int32",
        ),
        (Merge("counts"), lambda i: i | {"value": i["value"].float()}, "one dtype"),
        (Merge("norms"), lambda i: i | {"kept": i["kept"][:, :, ::2]}, "contiguous int32"),
        (WeightedAtoms(), lambda i: i | {"centres": i["centres"].float()}, "one dtype"),
        (RaggedHeadsDecodeAttention(), lambda i: i | {"context_lens": i["context_lens"][:, :1]}, "head lengths"),
        (RaggedHeadsDecodeAttention(), lambda i: i | {"query": i["query"].float()}, "one dtype"),
        (PageSparseDecodeAttention(), lambda i: i | {"selected_pages": i["selected_pages"].long()}, "int32"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_inputs_that_do_not_fit_are_refused(variant, change, message, kernel_device, kernel_target):
    case = variant.correctness_cases[1]
    config = variant.configs(kernel_target, case)[0]
    inputs = variant.make_inputs(case, seed=1, device=kernel_device)
    buffers = variant.allocate(case, inputs, config)
    with pytest.raises(ValueError, match=message):
        variant.plan(case, change(inputs), buffers, config)


def test_more_centres_than_fit_a_program_are_refused(kernel_device):
    case = AtomsBatch("many", "float16", 64, 16, ((600,),), 257)
    variant = WeightedAtoms()
    inputs = variant.make_inputs(case, seed=1, device=kernel_device)
    with pytest.raises(ValueError, match="1 to 256 centres"):
        variant.plan(case, inputs, variant.allocate(case, inputs, SELECTION), SELECTION)
