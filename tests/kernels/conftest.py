"""Run kernels in Triton's interpreter where no GPU is; the switch must be set before a kernel is defined."""

import os
from importlib.util import find_spec

import pytest


def _gpu_target():
    """Give the target name of the GPU that is present, or None."""
    if find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return torch.cuda.get_device_properties(0).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


GPU_TARGET = _gpu_target()
if GPU_TARGET is None:
    os.environ["TRITON_INTERPRET"] = "1"
    # The interpreter runs many small operations: a thread pool per test process costs more than it gives.
    os.environ["OMP_NUM_THREADS"] = "1"


def _version(module):
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@pytest.fixture(scope="session")
def kernel_device():
    """Where kernels run: a GPU, or the CPU under the interpreter."""
    if GPU_TARGET is not None:
        return "cuda"
    import numpy
    import triton

    if _version(triton) < (3, 7) and _version(numpy) >= (2, 4):
        pytest.skip("the interpreter of triton before 3.7 needs numpy before 2.4")
    from kernels.harness.interpreter import compute_narrow_floats_by_value

    compute_narrow_floats_by_value()
    return "cpu"


@pytest.fixture(scope="session")
def kernel_target():
    """The target whose tilings are run: the GPU's, or an H100's in the interpreter."""
    return GPU_TARGET or "sm_90"
