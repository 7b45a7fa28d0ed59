"""Kernels compile to machine code for each target without a GPU, within the target's registers and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="kernels need torch (the kernels extra)")
pytest.importorskip("triton", reason="kernels need triton (the kernels extra)")

PROBE = Path(__file__).with_name("compile_probe.py")
CHECKOUT = Path(__file__).resolve().parents[2]
# Shared memory per program: CUDA C++ Programming Guide, table of compute capabilities; CDNA 3 ISA guide (LDS).
SHARED_LIMIT_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
SPLIT_KERNEL = "decode_attention_split_kernel"


@pytest.fixture(scope="module", params=SHARED_LIMIT_BYTES)
def compiled(request, tmp_path_factory):
    """Give the target's name and a row of resources per compiled kernel."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, str(PROBE), request.param]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, json.loads(done.stdout)


def test_shared_memory_is_within_the_limit(compiled):
    target, rows = compiled
    assert rows
    assert {row["kernel"] for row in rows} == {SPLIT_KERNEL, "decode_attention_combine_kernel"}
    assert all(row["shared_bytes"] <= SHARED_LIMIT_BYTES[target] for row in rows), rows


def test_nothing_spills(compiled):
    _, rows = compiled
    assert [row for row in rows if row["spill_bytes"]] == []


def test_attention_runs_on_the_matrix_units(compiled):
    _, rows = compiled
    assert all(row["has_mma"] for row in rows if row["kernel"] == SPLIT_KERNEL)


def test_keys_and_values_are_prefetched(compiled):
    # A block-table load that feeds the K load inside the loop would leave one buffer, whatever num_stages says.
    target, rows = compiled
    if not target.startswith("sm_"):
        pytest.skip("buffers in shared memory are read from the CUDA pipeline only")
    for row in rows:
        if row["kernel"] == SPLIT_KERNEL:
            assert row["kv_buffers"] == [row["stages"] - 1] * 2, row
