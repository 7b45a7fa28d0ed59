"""A set as one engine uses it: whose kernels `auto` takes."""

from __future__ import annotations

import pytest

from kvsim.calibration.frameworks import COLLECTIVES, RUN_AS_TIMED, preferring
from kvsim.calibration.sets import load_set

DEVICES = ("h100-sxm", "b200-sxm", "l40s")
FRAMEWORKS = tuple(RUN_AS_TIMED)


def defaults(calibration, device):
    """Kernel that `auto` takes, by operation and format."""
    return {
        (pin.operation, pin.dtype, pin.kv_dtype): pin.kernel
        for pin in calibration.pins
        if pin.device == device and pin.default
    }


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("device", DEVICES)
def test_only_choices_change(device, framework):
    before = load_set()
    after = preferring(before, device, framework)
    assert [pin.model_copy(update={"default": False}) for pin in after.pins] == [
        pin.model_copy(update={"default": False}) for pin in before.pins
    ]
    # Still one choice for each format that had one, and none on other devices moved.
    assert defaults(after, device).keys() == defaults(before, device).keys()
    assert all(defaults(after, other) == defaults(before, other) for other in DEVICES if other != device)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_framework_comes_first_where_it_was_timed(device, framework):
    before = load_set()
    chosen = defaults(preferring(before, device, framework), device)
    timed = {
        (pin.operation, pin.dtype, pin.kv_dtype)
        for pin in before.pins
        if pin.device == device and pin.kernel.startswith(f"{framework}/") and pin.operation in RUN_AS_TIMED[framework]
    }
    for key, kernel in chosen.items():
        assert kernel.startswith(f"{framework}/") if key in timed else kernel == defaults(before, device)[key]


def test_choosing_twice_is_choosing_once():
    once = preferring(load_set(), "h100-sxm", "sglang")
    assert preferring(load_set(), "h100-sxm", "sglang") is once
    assert preferring(once, "h100-sxm", "sglang").pins == once.pins


def test_linear_layers_of_tensorrt_llm_stay_as_they_are():
    before = defaults(load_set(), "b200-sxm")
    after = defaults(preferring(load_set(), "b200-sxm", "trtllm"), "b200-sxm")
    assert {key: kernel for key, kernel in after.items() if key[0] == "gemm"} == {
        key: kernel for key, kernel in before.items() if key[0] == "gemm"
    }
    assert after["decode_attention", "bf16", "fp8"].startswith("trtllm/")


def test_collectives_alone():
    before = defaults(load_set(), "b200-sxm")
    after = defaults(preferring(load_set(), "b200-sxm", "trtllm", COLLECTIVES), "b200-sxm")
    assert {key for key in after if after[key] != before[key]} == {("all_reduce", "bf16", "")}


def test_an_unknown_framework_changes_nothing():
    assert preferring(load_set(), "h100-sxm", "llamacpp").pins == load_set().pins
