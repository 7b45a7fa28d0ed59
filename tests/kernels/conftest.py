"""Run kernels in Triton's interpreter where no GPU is; the switch must be set before a kernel is defined."""

import os
from contextlib import contextmanager
from importlib.util import find_spec

import pytest


def _has_gpu():
    if find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


HAS_GPU = _has_gpu()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def kernel_device():
    """Where kernels run: a GPU, or the CPU under the interpreter."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(scope="session")
def interpreted():
    return not HAS_GPU


@pytest.fixture
def nan_where_uninitialised():
    """Give a context in which torch fills fresh memory with NaN, so that a read of it shows."""

    @contextmanager
    def poisoned():
        import torch

        torch.use_deterministic_algorithms(True)
        assert torch.utils.deterministic.fill_uninitialized_memory
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)

    return poisoned
