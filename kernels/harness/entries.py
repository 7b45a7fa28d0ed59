"""Entries of calibration/compiled: what is known of a variant without a GPU, one JSON file each."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

import triton

from .. import KERNELS
from ..contract import Variant
from .probe import Row
from .source_hash import source_sha256

SCHEMA_VERSION = 1
_PACKAGE = __name__.removesuffix(".harness.entries")
_OF_A_KERNEL = ("registers", "spill_bytes", "shared_bytes", "kv_buffers")
_OF_THE_COUNT = (
    "matrix_instructions", "body", "units", "unrolled_by", "instructions", "loops_counted_once", "clocks",
    "busiest_pipe", "unpriced",
)  # fmt: skip


def kernels_by_variant() -> dict[str, tuple[str, Variant]]:
    """Give each variant by name, with the name in ``KERNELS`` of the folder that it stands in.

    Raises
    ------
    ValueError
        Two variants have one name.
    """
    found: dict[str, tuple[str, Variant]] = {}
    for kernel in KERNELS:
        for variant in import_module(f"{_PACKAGE}.{kernel}.cases").VARIANTS:
            if variant.name in found:
                msg = f"two variants are named {variant.name}: in {found[variant.name][0]} and {kernel}"
                raise ValueError(msg)
            found[variant.name] = (kernel, variant)
    return found


def file_name(variant_name: str) -> str:
    """Name of an entry's file."""
    return variant_name.replace("/", "-") + ".json"


def build_entry(kernel: str, variant: Variant, rows: Iterable[Row], correctness: Mapping[str, Any]) -> dict[str, Any]:
    """Put together an entry.

    Parameters
    ----------
    kernel : str
        The folder's name in ``KERNELS``.
    variant : Variant
    rows : iterable of dict
        Of the probe for this variant, all targets and configurations.
    correctness : mapping
        ``where`` it was checked, with which ``triton``, and how many ``cases`` there are and ``passed``.

    Raises
    ------
    ValueError
        A row is an error.
    """
    rows = list(rows)
    traffic = max((variant.traffic(case) for case in variant.timing_cases), key=lambda one: one.units)
    targets = dict.fromkeys(row["target"] for row in rows)
    return {
        "schema_version": SCHEMA_VERSION,
        "variant": variant.name,
        "operation": variant.operation,
        "kv_format": variant.kv_format.name if variant.kv_format else None,
        "strategy": variant.kv_format.strategy if variant.kv_format else None,
        "form": variant.form,
        "cost_unit": variant.cost_unit,
        "read_bytes_per_unit": _rounded(traffic.read_bytes / traffic.units),
        "written_bytes_per_unit": _rounded(traffic.written_bytes / traffic.units),
        "compile_case": variant.compile_case.name,
        "triton": triton.__version__,
        "kernel": kernel,
        "source_sha256": source_sha256(kernel),
        "correctness": dict(correctness),
        "targets": {target: target_section([row for row in rows if row["target"] == target]) for target in targets},
    }


def target_section(rows: Sequence[Row]) -> dict[str, Any]:
    """Sum up a variant's rows for one target: the reason why it is unsupported, or its configurations.

    Raises
    ------
    ValueError
        A row is an error.
    """
    for row in rows:
        if "error" in row:
            msg = f"{row['variant']} for {row['target']}, {row.get('config', 'no configuration')}: {row['error']}"
            raise ValueError(msg)
        if "unsupported" in row:
            return {"unsupported": row["unsupported"]}
    configs: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = json.dumps(row["config"])
        section = configs.setdefault(key, {"config": row["config"], "kernels": {}})
        if "skipped" in row:
            section.setdefault("not_compiled", []).append(row["kernel"])
            continue
        # A kernel compiled for two specialisations of one plan gets a row each.
        taken = sum(name.split("#")[0] == row["kernel"] for name in section["kernels"])
        name = f"{row['kernel']}#{taken + 1}" if taken else row["kernel"]
        section["kernels"][name] = {key: row[key] for key in _OF_A_KERNEL}
        if "clocks" in row:
            section["count"] = {"kernel": name} | {key: row[key] for key in _OF_THE_COUNT}
    return {"configs": list(configs.values())}


def dump(entry: Mapping[str, Any]) -> str:
    """Write an entry as text that is the same whenever the entry is, innermost objects on a line each."""
    text = json.dumps(entry, indent=1, sort_keys=True, ensure_ascii=False)
    for innermost in (r"\[[^\[\]{}]*\]", r"\{[^{}]*\}"):
        text = re.sub(innermost, lambda found: re.sub(r"\n\s*", " ", found.group()), text)
    return text + "\n"


def _rounded(value: float) -> float:
    """Four significant digits: what a figure can bear, and stable in print."""
    return float(f"{value:.4g}")
