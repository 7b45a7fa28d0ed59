"""Kernels compile without a GPU to what calibration/compiled records, and every recorded tiling fits its target."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="kernels need torch (the kernels extra)")
triton = pytest.importorskip("triton", reason="kernels need triton (the kernels extra)")

from kernels.harness.catalog import all_variants  # noqa: E402
from kernels.harness.entries import file_name, target_section  # noqa: E402
from kernels.harness.probe import TARGETS, probe  # noqa: E402
from kernels.harness.targets import ARCHITECTURES  # noqa: E402

ENTRIES = Path(__file__).resolve().parents[2] / "calibration" / "compiled"
VARIANTS = {variant.name: variant for variant in all_variants()}
# All tilings for all targets would take CI ten minutes of two cores. An entry holds them and goes stale with its
# sources, so each variant's default tiling is compiled again for one target in turn; all where this variable is set.
COMPILE_EVERYTHING = bool(os.environ.get("KVSIM_COMPILE_EVERYTHING"))
TARGETS_EACH = len(TARGETS) if COMPILE_EVERYTHING else 1
CHUNK = 6


def chunks():
    """Give a target and some names of variants to compile for it in one process."""
    for place, target in enumerate(TARGETS):
        names = [name for number, name in enumerate(VARIANTS) if (place - number) % len(TARGETS) < TARGETS_EACH]
        for first in range(0, len(names), CHUNK):
            part = names[first : first + CHUNK]
            yield pytest.param(target, part, id=f"{target}-{part[0]}-and-{len(part) - 1}-more")


def limit_problems(variant, target, section):
    """Say what exceeds the target's limits, spills in the default tiling, or misses the matrix units."""
    limits = ARCHITECTURES[target]
    for number, one in enumerate(section["configs"]):
        for kernel, used in one["kernels"].items():
            if used["registers"] > limits.max_registers:
                yield f"{kernel} {one['config']}: {used['registers']} registers"
            if used["shared_bytes"] > limits.max_shared_bytes:
                yield f"{kernel} {one['config']}: {used['shared_bytes']} bytes of shared memory"
            # As-shipped forms are shown as they are, local memory included.
            if used["spill_bytes"] and number == 0 and variant.form == "best":
                yield f"{kernel} {one['config']}: spills {used['spill_bytes']} bytes in the default tiling"
        count = one.get("count")
        if count and variant.uses_matrix_units and not count["matrix_instructions"]:
            yield f"{count['kernel']} {one['config']}: no matrix instruction"


NOT_PREFETCHED = {
    "decode_attention/topk/fp8_ds_mla/best": "reads scattered records into registers; Triton gives it no buffer",
}


def prefetch_problems(variant, target, section):
    """Say where the best form of decode attention does not keep as many tiles in flight as its pipeline is deep.

    A block-table load that feeds the K load inside the loop would leave one buffer, whatever num_stages says.
    """
    is_bound = variant.operation.startswith("decode_attention") and variant.form == "best"
    if not is_bound or target.startswith("gfx") or variant.name in NOT_PREFETCHED:
        return
    for one in section["configs"]:
        if "count" not in one:
            continue
        buffers = one["kernels"][one["count"]["kernel"]]["kv_buffers"]
        if min(buffers, default=0) < one["config"]["num_stages"] - 1:
            yield f"{one['count']['kernel']} {one['config']}: {buffers} buffers"


def record_problems(entry, target, section):
    """Say where the recorded figures differ from those of the machine code."""
    if entry is None:
        yield "no entry in calibration/compiled; run tools/write_compiled_kernels.py"
        return
    if entry["triton"] != triton.__version__:
        return
    recorded = entry["targets"].get(target, {})
    if not COMPILE_EVERYTHING and "configs" in recorded:
        recorded = {"configs": recorded["configs"][:1]}
    if json.loads(json.dumps(section)) != recorded:
        yield f"its entry is stale; run tools/write_compiled_kernels.py: recorded {recorded}, compiled {section}"


def read_entry(name):
    path = ENTRIES / file_name(name)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


@pytest.mark.parametrize(("target", "names"), list(chunks()))
def test_variants_compile_to_what_is_recorded(target, names):
    rows = list(probe(names, [target], all_configs=COMPILE_EVERYTHING))
    problems = []
    for name in names:
        try:
            section = target_section([row for row in rows if row["variant"] == name])
        except ValueError as error:
            problems.append(str(error))
        else:
            problems += [f"{name} for {target}: {one}" for one in record_problems(read_entry(name), target, section)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("variant", list(VARIANTS.values()), ids=list(VARIANTS))
def test_every_recorded_tiling_is_within_the_limits(variant):
    entry = read_entry(variant.name)
    assert entry, "no entry in calibration/compiled; run tools/write_compiled_kernels.py"
    assert set(entry["targets"]) == set(TARGETS)
    problems = [
        f"{target}: {problem}"
        for target, section in entry["targets"].items()
        if "configs" in section
        for rule in (limit_problems, prefetch_problems)
        for problem in rule(variant, target, section)
    ]
    assert not problems, "\n".join(problems)


def test_a_failure_is_unsupported_only_for_the_reason_given():
    from kernels.harness.probe import _failure

    assert _failure("type fp8e4nv", "CompilationError: type fp8e4nv not supported") == {"unsupported": "type fp8e4nv"}
    assert "not for the reason given" in _failure("type fp8e4nv", "out of memory")["error"]
    assert "although the variant says" in _failure("type fp8e4nv", "")["error"]
    assert _failure(None, "out of memory") == {"error": "out of memory"}


def test_a_compiler_that_dies_costs_only_its_variant(monkeypatch):
    from kernels.harness import probe as module

    first, second = list(VARIANTS)[:2]
    answers = iter(
        [
            ([{"variant": first, "target": "sm_90", "kernel": "one"}, {"finished": first}], "LLVM ERROR: no", -6),
            ([], "", 0),
        ]
    )
    asked = []

    def child(names, _target, *, all_configs):
        asked.append((list(names), all_configs))
        return next(answers)

    monkeypatch.setattr(module, "_child", child)
    third = list(VARIANTS)[2]
    with pytest.raises(RuntimeError, match=f"ended before {third}"):
        module._probe_target([first, second, third], "sm_90", all_configs=False)
    assert asked == [([first, second, third], False), ([third], False)]
    answers = iter([([{"finished": first}], "LLVM ERROR: no", -6)])
    rows = module._probe_target([first, second], "sm_90", all_configs=False)
    assert [row["variant"] for row in rows] == [second]
    assert "status -6: LLVM ERROR: no" in rows[0]["error"]
