"""docs/kernels.md shows what calibration/compiled holds."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from kvsim.kernel_catalog import load_compiled_kernels

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(CHECKOUT / "tools")
        yield importlib.import_module("write_kernel_table")


def test_page_is_what_the_tool_writes(tool):
    page = (CHECKOUT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert tool.with_tables(page, load_compiled_kernels()) == page, "run python tools/write_kernel_table.py"


def test_budgets_are_bandwidth_per_multiprocessor_and_clock(tool):
    # 3.35 TB/s over 132 multiprocessors at 1.755 GHz.
    by_name = {gpu.name: gpu for gpu in tool.GPUS}
    assert by_name["H100"].bytes_per_clock() == pytest.approx(14.46, abs=0.01)
    assert by_name["A100"].bytes_per_clock() == pytest.approx(13.39, abs=0.01)


def test_earlier_counts_name_kernels_that_exist(tool):
    assert set(tool.EARLIER) <= {kernel.variant for kernel in load_compiled_kernels()}


def test_speed_up_is_bound_by_the_slower_of_memory_and_pipe(tool):
    kernels = {kernel.variant: kernel for kernel in load_compiled_kernels()}
    baseline = kernels[tool.BASELINE]
    gpu = tool.GPUS[1]
    assert tool.speed_up(baseline, baseline, gpu) == 1.0
    for kernel in tool.decode_kernels(list(kernels.values())):
        found = tool.speed_up(kernel, baseline, gpu)
        if found is not None:
            assert found <= baseline.read_bytes_per_unit / kernel.read_bytes_per_unit + 1e-9
