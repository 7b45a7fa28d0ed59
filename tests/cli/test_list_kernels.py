"""``kvsim list kernels`` and the entries that it reads."""

from __future__ import annotations

import json

import pytest

from kvsim import kernel_catalog
from kvsim.errors import InvalidSpec
from kvsim.kernel_catalog import TARGETS, load_compiled_kernel, load_compiled_kernels, measured_sources

HASH = "0" * 64


def entry(**changes):
    count = {
        "kernel": "decode_kernel", "matrix_instructions": ["HMMA.16816.F32.BF16"], "body": "matrix_loop", "units": 64,
        "unrolled_by": 1, "instructions": 500, "loops_counted_once": 0, "clocks": {"alu": 9.0, "issue": 12.34},
        "busiest_pipe": "issue", "unpriced": [],
    }  # fmt: skip
    kernel = {"registers": 128, "spill_bytes": 0, "shared_bytes": 4096, "kv_buffers": [2, 2]}
    config = {
        "config": {"block_n": 64, "num_warps": 4, "num_stages": 3},
        "kernels": {"decode_kernel": kernel},
        "count": count,
    }
    values = {
        "schema_version": 1, "variant": "decode_attention/int4/best", "operation": "decode_attention",
        "kv_format": "int4", "strategy": None, "form": "best", "cost_unit": "token_kv_head",
        "read_bytes_per_unit": 132.0, "written_bytes_per_unit": 0.01, "compile_case": "llama-3-8b", "triton": "3.6.0",
        "kernel": "decode_attention.int4", "source_sha256": HASH,
        "correctness": {"where": "interpreter", "triton": "3.6.0", "passed": 8, "cases": 8},
        "targets": {"sm_90": {"configs": [config]}, "sm_80": {"unsupported": "type fp8e4nv not supported"}},
    }  # fmt: skip
    return values | changes


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of shipped data with one entry; caches are emptied before and after."""
    monkeypatch.setattr(kernel_catalog, "data_dir", lambda name: tmp_path / name)
    write(tmp_path, entry())
    caches = (load_compiled_kernels, measured_sources)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def write(folder, values, name="decode_attention-int4-best.json"):
    path = folder / "calibration" / "compiled" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def measure(folder, text):
    path = folder / "calibration" / "measured" / "h100-sxm" / "rows.csv"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_json_has_supported_targets_and_reasons(invoke, data):
    (shown,) = json.loads(invoke("list", "kernels", "--json").stdout)
    assert shown["name"] == "decode_attention/int4/best"
    assert (shown["operation"], shown["format"], shown["form"]) == ("decode_attention", "int4", "best")
    assert shown["correctness"] == "interpreter 8/8"
    assert shown["measured"] is False
    assert shown["targets"]["sm_80"] == {"supported": False, "reason": "type fp8e4nv not supported"}
    hopper = shown["targets"]["sm_90"]
    assert (hopper["supported"], hopper["clocks"], hopper["busiest_pipe"]) == (True, 12.34, "issue")


def test_table_shows_clocks_checks_and_gaps(invoke, data):
    done = invoke("list", "kernels")
    (row,) = (line for line in done.stdout.splitlines() if "int4/best" in line)
    assert row.split() == ["int4/best", "8/8", "-", "12.3", "issue", "-", "-", "-", "token_kv_head", "no"]
    assert "not measured" in done.stderr


def test_narrow_terminals_get_two_lines_per_kernel(invoke, data, monkeypatch):
    monkeypatch.setattr("kvsim.cli.listing.stdout_width", lambda: 80)
    lines = invoke("list", "kernels").stdout.splitlines()
    assert lines == [
        "decode_attention/int4/best  interpreter 8/8  not measured",
        "  sm_80 -  sm_90 12.3  sm_100 -  sm_120 -  gfx942 -",
    ]


@pytest.mark.parametrize("change", [{"loops_counted_once": 1}, {"unpriced": ["UTCHMMA"]}])
def test_counts_known_to_be_too_low_are_marked(invoke, data, change):
    values = entry()
    values["targets"]["sm_90"]["configs"][0]["count"] |= change
    write(data, values)
    assert "12.3+ issue" in invoke("list", "kernels").stdout


def test_library_calls_have_no_clocks(invoke, data):
    only_call = {"config": {"block_n": 1}, "kernels": {}, "not_compiled": ["torch.matmul"]}
    write(data, entry(targets={"sm_90": {"configs": [only_call]}}))
    assert "library" in invoke("list", "kernels").stdout


@pytest.mark.parametrize(
    ("basis", "digest", "expected"),
    [("measured", HASH, True), ("measured", "1" * 64, False), ("interpreter", HASH, False)],
)
def test_measured_means_this_very_source_on_a_gpu(invoke, data, basis, digest, expected):
    measure(data, f"basis,source_sha256,variant\n{basis},{digest},decode_attention/int4/best\n")
    (shown,) = json.loads(invoke("list", "kernels", "--json").stdout)
    assert shown["measured"] is expected


def test_measured_rows_without_a_hash_are_refused(data):
    path = measure(data, "basis,variant\nmeasured,decode_attention/int4/best\n")
    with pytest.raises(InvalidSpec, match=f"{path}: has no column source_sha256"):
        measured_sources()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "beast"}, "form: 'beast' is not allowed; allowed: best, as_shipped; did you mean 'best'?"),
        ({"source_sha256": "abc"}, "source_sha256: "),
        ({"speed": 1}, "speed: unknown key"),
        ({"targets": {"sm_75": {"unsupported": "old"}}}, "targets may be sm_80, "),
        ({"targets": {"sm_90": {}}}, "targets.sm_90: a target needs configs or the reason"),
        ({"variant": "decode_attention/int8/best"}, "variant: 'decode_attention/int8/best' belongs into decode_"),
    ],
)
def test_a_broken_entry_is_named_with_its_field(data, change, message):
    path = write(data, entry(**change))
    with pytest.raises(InvalidSpec) as caught:
        load_compiled_kernel(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_the_busiest_pipe_must_be_the_busiest(data):
    values = entry()
    values["targets"]["sm_90"]["configs"][0]["count"]["busiest_pipe"] = "alu"
    with pytest.raises(InvalidSpec, match=r"targets\.sm_90\.configs\.0\.count: busiest_pipe must name the pipe"):
        load_compiled_kernel(write(data, values))


def test_no_entries_no_rows(invoke, data):
    (data / "calibration" / "compiled" / "decode_attention-int4-best.json").unlink()
    assert json.loads(invoke("list", "kernels", "--json").stdout) == []
    assert invoke("list", "kernels").exit_code == 0


def test_shipped_entries_are_valid():
    kernels = load_compiled_kernels()
    assert len({kernel.variant for kernel in kernels}) == len(kernels) > 0
    assert all(set(kernel.targets) == set(TARGETS) for kernel in kernels)
