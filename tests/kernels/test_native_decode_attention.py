"""Laws of decode attention over a native cache, on a GPU or in the interpreter."""

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="kernels need torch (the kernels extra)")
pytest.importorskip("triton", reason="kernels need triton (the kernels extra)")

import kernels  # noqa: E402
from kernels.decode_attention.batch import TIMING_BATCHES, choose_num_splits  # noqa: E402
from kernels.decode_attention.native.cases import VARIANTS  # noqa: E402
from kernels.harness.check import TOLERANCES, run  # noqa: E402
from kernels.launches import LaunchConfig  # noqa: E402

# Triton 3.6's interpreter turns one-element arrays into loop bounds.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
CONFIG = LaunchConfig(block_n=32, num_warps=4, num_stages=2)
NATIVE = VARIANTS[0]
BY_NAME = {case.name: case for case in NATIVE.correctness_cases}
RAGGED, RAGGED_FP32 = BY_NAME["ragged-gqa"], BY_NAME["ragged-gqa-fp32"]


def output_of(case, inputs, config=CONFIG):
    return run(NATIVE, case, inputs, config)["output"]


def test_the_kernels_under_test_are_those_of_this_checkout():
    assert Path(kernels.__file__).resolve().parent == Path(__file__).resolve().parents[2] / "kernels"


@pytest.mark.parametrize("num_splits", [1, 2, 8])
@pytest.mark.parametrize("block_n", [16, 128])
def test_the_tiling_does_not_change_the_result(num_splits, block_n, kernel_device):
    case = replace(RAGGED_FP32, num_splits=num_splits)
    inputs = NATIVE.make_inputs(case, seed=1, device=kernel_device)
    output = output_of(case, inputs, LaunchConfig(block_n, num_warps=4, num_stages=2))
    expected = NATIVE.reference(case, inputs)["output"]
    torch.testing.assert_close(output, expected, atol=TOLERANCES["float32"], rtol=0)


def test_large_scores_do_not_overflow(kernel_device):
    inputs = NATIVE.make_inputs(RAGGED_FP32, seed=2, device=kernel_device)
    inputs["query"] *= 1e4
    output = output_of(RAGGED_FP32, inputs)
    assert output.isfinite().all()
    torch.testing.assert_close(output, NATIVE.reference(RAGGED_FP32, inputs)["output"], atol=1e-2, rtol=0)


def test_values_of_one_pass_through(kernel_device):
    # The weights of a softmax sum to one.
    inputs = NATIVE.make_inputs(RAGGED, seed=3, device=kernel_device)
    inputs["fields"]["value"][...] = 1.0
    output = output_of(RAGGED, inputs).float()
    has_tokens = inputs["context_lens"] > 0
    torch.testing.assert_close(output[has_tokens], torch.ones_like(output[has_tokens]), atol=1e-3, rtol=0)
    assert not output[~has_tokens].any()


def test_keys_and_values_may_lie_in_separate_pools(kernel_device):
    inputs = NATIVE.make_inputs(RAGGED, seed=4, device=kernel_device)
    apart = inputs | {"fields": {name: view.contiguous() for name, view in inputs["fields"].items()}}
    assert inputs["fields"]["key"].stride(0) != apart["fields"]["key"].stride(0)
    assert torch.equal(output_of(RAGGED, inputs), output_of(RAGGED, apart))


def _with_field(name, change):
    return lambda inputs: inputs | {"fields": inputs["fields"] | {name: change(inputs["fields"][name])}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with_field("key", lambda key: key.float()), "one dtype"),
        (_with_field("value", lambda value: value[:, :8]), "block_size"),
        (_with_field("value", lambda value: value.mT.contiguous().mT), "contiguous along head_dim"),
        (lambda i: i | {"query": i["query"][..., :32].contiguous()}, "head_dim"),
        (lambda i: i | {"query": i["query"][:, :3]}, "num_query_heads"),
        (lambda i: i | {"block_table": i["block_table"].long()}, "int32"),
        (lambda i: i | {"context_lens": i["context_lens"][:2]}, "row per request"),
        (lambda i: i | {"query": i["query"].mT.contiguous().mT}, "last dimension"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    inputs = NATIVE.make_inputs(RAGGED, seed=5, device="cpu")
    buffers = NATIVE.allocate(RAGGED, inputs, CONFIG)
    with pytest.raises(ValueError, match=message):
        NATIVE.plan(RAGGED, change(inputs), buffers, CONFIG)


def test_a_number_of_splits_that_is_no_power_of_two_is_refused():
    case = replace(RAGGED, num_splits=3)
    inputs = NATIVE.make_inputs(case, seed=5, device="cpu")
    with pytest.raises(ValueError, match="power of two"):
        NATIVE.plan(case, inputs, NATIVE.allocate(case, inputs, CONFIG), CONFIG)


@pytest.mark.parametrize(
    ("batch", "num_kv_heads", "max_context", "expected"),
    [(1, 8, 4096, 64), (1, 8, 100, 2), (64, 8, 4096, 1), (8, 8, 4096, 8), (4, 8, 0, 1)],
)
def test_splits_fill_the_device(batch, num_kv_heads, max_context, expected):
    # 132 multiprocessors: 264 programs wanted. 264/8 = 33 -> 64, but no more than tiles; 264/512 -> 1; 264/64 -> 8.
    assert choose_num_splits(batch, num_kv_heads, max_context, 132, block_n=64) == expected


def test_traffic_of_a_timing_case():
    # Llama-3.1-8B holds 131,072 bytes per token over 32 layers: 4,096 in one.
    case = next(case for case in TIMING_BATCHES if case.name == "8x1024-32/8")
    query_bytes = 8 * 32 * 128 * 2
    traffic = NATIVE.traffic(case)
    assert traffic.read_bytes == 8 * 1024 * 4096 + query_bytes
    assert traffic.written_bytes == query_bytes
    assert traffic.flops == 4 * 8 * 1024 * 32 * 128
    assert traffic.units == 8 * 1024 * 8


def test_timing_shapes_cover_what_a_fit_needs():
    roles = [case.role for case in TIMING_BATCHES]
    assert {role: roles.count(role) for role in set(roles)} == {"fit": 32, "small": 6, "long": 4, "held_out": 9}
    assert len({case.name for case in TIMING_BATCHES}) == len(TIMING_BATCHES)
