"""The Triton decode attention against its torch reference, on a GPU or in the interpreter."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="kernels need torch (the kernels extra)")
triton = pytest.importorskip("triton", reason="kernels need triton (the kernels extra)")
np = pytest.importorskip("numpy")

import kernels  # noqa: E402
from kernels.decode_attention.cases import CORRECTNESS_CASES, TIMING_CASES, TOLERANCES, make_inputs  # noqa: E402
from kernels.decode_attention.kernel import choose_num_splits, decode_attention  # noqa: E402
from kernels.decode_attention.reference import decode_attention_reference  # noqa: E402
from kernels.launches import LaunchConfig  # noqa: E402

# Triton 3.6's interpreter turns one-element arrays into loop bounds.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
CONFIG = LaunchConfig(block_n=32, num_warps=4, num_stages=2)
BY_NAME = {case.name: case for case in CORRECTNESS_CASES}


def version(module):
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@pytest.fixture(autouse=True)
def _working_interpreter(interpreted):
    if interpreted and version(triton) < (3, 7) and version(np) >= (2, 4):
        pytest.skip("the interpreter of triton before 3.7 needs numpy before 2.4")


def test_the_kernels_under_test_are_those_of_this_checkout():
    assert Path(kernels.__file__).resolve().parent == Path(__file__).resolve().parents[2] / "kernels"


@pytest.mark.parametrize("case", CORRECTNESS_CASES, ids=lambda case: case.name)
def test_kernel_equals_the_reference(case, kernel_device, interpreted, nan_where_uninitialised):
    if interpreted and case.dtype == "bfloat16":
        pytest.skip("Triton's interpreter multiplies bf16 as raw bits; needs a GPU")
    inputs = make_inputs(case, seed=7, device=kernel_device)
    with nan_where_uninitialised():
        assert inputs["query"].new_empty(3).isnan().all()
        output = decode_attention(**inputs, num_splits=case.num_splits, config=CONFIG)
    expected = decode_attention_reference(**inputs)
    assert output.dtype == inputs["query"].dtype
    assert not output.isnan().any()
    assert (output.float() - expected).abs().max().item() <= TOLERANCES[case.dtype]


@pytest.mark.parametrize("num_splits", [1, 2, 8])
@pytest.mark.parametrize("block_n", [16, 128])
def test_the_tiling_does_not_change_the_result(num_splits, block_n, kernel_device):
    inputs = make_inputs(BY_NAME["ragged-gqa-fp32"], seed=1, device=kernel_device)
    config = LaunchConfig(block_n=block_n, num_warps=4, num_stages=2)
    output = decode_attention(**inputs, num_splits=num_splits, config=config)
    torch.testing.assert_close(output, decode_attention_reference(**inputs), atol=2e-6, rtol=0)


def test_large_scores_do_not_overflow(kernel_device):
    inputs = make_inputs(BY_NAME["ragged-gqa-fp32"], seed=2, device=kernel_device)
    inputs["query"] *= 1e4
    output = decode_attention(**inputs, num_splits=4, config=CONFIG)
    assert output.isfinite().all()
    torch.testing.assert_close(output, decode_attention_reference(**inputs), atol=1e-2, rtol=0)


def test_values_of_one_pass_through(kernel_device):
    # The weights of a softmax sum to one.
    inputs = make_inputs(BY_NAME["ragged-gqa"], seed=3, device=kernel_device)
    inputs["value_cache"] = torch.ones_like(inputs["value_cache"])
    output = decode_attention(**inputs, num_splits=4, config=CONFIG).float()
    has_tokens = inputs["context_lens"] > 0
    torch.testing.assert_close(output[has_tokens], torch.ones_like(output[has_tokens]), atol=1e-3, rtol=0)
    assert not output[~has_tokens].any()


def test_caches_may_be_strided_views(kernel_device):
    # One allocation with K and V interleaved per block, as (num_blocks, 2, block_size, num_kv_heads, head_dim).
    inputs = make_inputs(BY_NAME["ragged-gqa"], seed=4, device=kernel_device)
    both = torch.stack([inputs["key_cache"], inputs["value_cache"]], dim=1)
    views = inputs | {"key_cache": both[:, 0], "value_cache": both[:, 1]}
    apart = decode_attention(**inputs, num_splits=2, config=CONFIG)
    assert torch.equal(decode_attention(**views, num_splits=2, config=CONFIG), apart)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i | {"key_cache": i["key_cache"].float()}, "one dtype"),
        (lambda i: i | {"value_cache": i["value_cache"][:, :8]}, "one shape"),
        (lambda i: i | {"query": i["query"][..., :32].contiguous()}, "one head_dim"),
        (lambda i: i | {"query": i["query"][:, :3]}, "multiple"),
        (lambda i: i | {"block_table": i["block_table"].long()}, "int32"),
        (lambda i: i | {"context_lens": i["context_lens"][:2]}, "row per request"),
        (lambda i: i | {"query": i["query"].mT.contiguous().mT}, "last dimension"),
        (lambda i: i | {"num_splits": 3}, "power of two"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    inputs = make_inputs(BY_NAME["ragged-gqa"], seed=5) | {"num_splits": 2}
    with pytest.raises(ValueError, match=message):
        decode_attention(**change(inputs), config=CONFIG)


@pytest.mark.parametrize(
    ("batch", "num_kv_heads", "max_context", "expected"),
    [(1, 8, 4096, 64), (1, 8, 100, 2), (64, 8, 4096, 1), (8, 8, 4096, 8), (4, 8, 0, 1)],
)
def test_splits_fill_the_device(batch, num_kv_heads, max_context, expected):
    # 132 multiprocessors: 264 programs wanted. 264/8 = 33 -> 64, but no more than tiles; 264/512 -> 1; 264/64 -> 8.
    assert choose_num_splits(batch, num_kv_heads, max_context, 132, block_n=64) == expected


def test_bytes_of_a_timing_case():
    # Llama-3.1-8B holds 131,072 bytes per token over 32 layers: 4,096 in one.
    case = next(case for case in TIMING_CASES if case.name == "llama-3-8b-8x4096")
    assert case.kv_bytes == 8 * 4096 * 4096
