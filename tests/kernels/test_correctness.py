"""Every variant of every kernel against its reference, on a GPU or in Triton's interpreter."""

import random

import pytest

torch = pytest.importorskip("torch", reason="kernels need torch (the kernels extra)")
pytest.importorskip("triton", reason="kernels need triton (the kernels extra)")

from kernels.harness.catalog import all_variants  # noqa: E402
from kernels.harness.check import CheckFailed, check, compare, run  # noqa: E402

# Triton 3.6's interpreter turns one-element arrays into loop bounds.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
CASES = [
    pytest.param(variant, case, id=f"{variant.name}-{case.name}")
    for variant in all_variants()
    for case in variant.correctness_cases
]


@pytest.mark.parametrize(("variant", "case"), CASES)
def test_variant_equals_its_reference(variant, case, kernel_device, kernel_target):
    if reason := variant.unsupported(kernel_target):
        pytest.skip(f"{kernel_target}: {reason}")
    seed = random.SystemRandom().randrange(1 << 30)
    try:
        check(variant, case, seed=seed, device=kernel_device, config=variant.configs(kernel_target, case)[0])
    except CheckFailed as failure:
        pytest.fail(f"{failure}; seed {seed}")


@pytest.mark.parametrize("variant", all_variants(), ids=lambda variant: variant.name)
def test_a_wrong_result_is_noticed(variant, kernel_device, kernel_target):
    if reason := variant.unsupported(kernel_target):
        pytest.skip(f"{kernel_target}: {reason}")
    case = variant.correctness_cases[0]
    config = variant.configs(kernel_target, case)[0]
    inputs = variant.make_inputs(case, seed=1, device=kernel_device)
    buffers = run(variant, case, inputs, config)
    for name, expected in variant.reference(case, inputs).items():
        wrong = buffers[name].clone()
        flat = wrong.view(torch.uint8) if wrong.element_size() == 1 else wrong
        flat[...] = 77
        outcome = compare(variant, case, name, wrong, expected)
        assert not outcome.error <= outcome.tolerance, name
