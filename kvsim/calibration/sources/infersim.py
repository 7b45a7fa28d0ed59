"""Kernel benchmarks of InferSim: CSV files by operation, phase, GPU and heads, latency in µs.

``mha/decode/<gpu>/<heads>-<kv heads>-<head size>.csv`` (FlashInfer) and ``mha/prefill`` (FlashAttention-3, causal, one
prompt), ``mla/decode/<gpu>/<heads>-<latent>-<rope>.csv`` (FlashMLA) and ``mla/prefill`` (FlashAttention-3),
``gemm/<gpu>/data.csv`` (DeepGEMM: its utilization is of the FP8 peak). ``kv_len`` counts all tokens read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import polars as pl

from kvsim.calibration.device_names import resolve_device
from kvsim.calibration.sources.frames import (
    US,
    build_timings,
    check_columns,
    empty_frame,
    file_origin,
    merge,
    nothing_found,
    read_csv,
    rename_values,
)
from kvsim.calibration.timings import Excluded, Timings
from kvsim.errors import InvalidSpec

ORIGIN = "InferSim kernel benchmarks (Alibaba), github.com/alibaba/InferSim"
LICENCE = "Apache-2.0"
VERSION = "unstated"
DTYPES: Mapping[str, str] = {"bf16": "bf16", "fp16": "fp16", "fp8": "fp8"}
UNREAD_TABLE = "table of another operation"
NO_HEADER = "table without a header, and of another kernel: one sequence takes as long as sixteen"
OTHER_LATENT = "MLA of another size than DeepSeek-V3's"
FOLDERS = ("mha", "mla", "gemm", "dsa", "gdn", "grouped_gemm")
KERNELS: Mapping[tuple[str, str], tuple[str, str]] = {
    ("mha", "decode"): ("decode_attention", "infersim/flashinfer"),
    ("mha", "prefill"): ("prefill_attention", "infersim/flash_attn_fa3"),
    ("mla", "decode"): ("mla_decode", "infersim/flashmla"),
    ("mla", "prefill"): ("mla_prefill", "infersim/flash_attn_fa3"),
    ("gemm", ""): ("gemm", "infersim/deepgemm"),
}
"""Operation and kernel by folder and phase; the README names the kernels."""
_LATENTS = {"decode": (512, 64), "prefill": (128, 64)}
_SIZES = re.compile(r"(\d+)-(\d+)-(\d+)")


def find_tables(folder: Path) -> list[Path]:
    """CSV files whose folders are InferSim's, sorted; `folder` may lie anywhere above or be such a file."""
    paths = [folder] if folder.is_file() else sorted(folder.rglob("*.csv"))
    return [path for path in paths if path.suffix == ".csv" and _place(path) is not None]


def _place(path: Path) -> tuple[str, str, str] | None:
    """Kind, phase and GPU folder of a file, None where it lies elsewhere."""
    parts = path.absolute().parts
    if len(parts) >= 4 and parts[-4] in FOLDERS and parts[-3] in ("prefill", "decode"):
        return parts[-4], parts[-3], parts[-2]
    if len(parts) >= 3 and parts[-3] == "gemm" and path.name == "data.csv":
        return parts[-3], "", parts[-2]
    return None


def read(
    folder: Path, devices: Collection[str] | None = None, operations: Collection[str] | None = None
) -> list[Timings]:
    """Read every benchmark under `folder`; arguments and errors as in `aiconfigurator.read`."""
    wanted = None if devices is None else {resolve_device(name, "devices") for name in devices}
    paths = find_tables(folder)
    if not paths:
        raise nothing_found(folder, "InferSim benchmark (mha/decode/<gpu>/<heads>-<kv heads>-<head size>.csv)")
    parts: list[Timings] = []
    for path in paths:
        kind, phase, gpu = _place(path) or ("", "", "")
        device = resolve_device(gpu, f"{path}: folder")
        operation, kernel = KERNELS.get((kind, phase), ("kernel", ""))
        if (wanted is not None and device not in wanted) or (operations is not None and operation not in operations):
            continue
        if not kernel:
            parts.append(Timings(operation, empty_frame(operation), (_all_of(path, UNREAD_TABLE),)))
            continue
        parts.extend(_read_table(path, folder, operation, kernel, device))
    return _joined(parts)


def _joined(parts: list[Timings]) -> list[Timings]:
    """One Timings per key, and one for all that is left out of each operation."""
    rows = [one for one in parts if not one.frame.is_empty()]
    rest: dict[str, list[Excluded]] = {}
    for one in parts:
        if one.frame.is_empty():
            rest.setdefault(one.operation, []).extend(one.excluded)
    return [*merge(rows), *(Timings(name, empty_frame(name), tuple(out)) for name, out in rest.items())]


def _all_of(path: Path, reason: str) -> Excluded:
    lines = sum(1 for line in path.read_bytes().splitlines() if line.strip())
    return Excluded(reason, lines if reason == NO_HEADER else max(0, lines - 1), "/".join(path.parts[-4:]))


def _read_table(path: Path, folder: Path, operation: str, kernel: str, device: str) -> list[Timings]:
    raw = read_csv(path)
    if raw.columns and all(re.match(r"bf16|fp8|fp16|[\d.]+(_duplicated_\d+)?$", name) for name in raw.columns):
        return [Timings(operation, empty_frame(operation), (_all_of(path, NO_HEADER),))]
    raw = check_columns(raw, path, numbers=("latency_us",))
    shape, excluded = _gemm(raw, path) if operation == "gemm" else _attention(raw, path, operation)
    frame = shape.with_columns(
        device=pl.lit(device), operation=pl.lit(operation), kernel=pl.lit(kernel), version=pl.lit(VERSION),
        seconds=raw["latency_us"] * US,
    )  # fmt: skip
    if excluded:
        frame = frame.clear()
    return build_timings(operation, frame, excluded, [file_origin(path, folder, ORIGIN, LICENCE)])


def _gemm(raw: pl.DataFrame, path: Path) -> tuple[pl.DataFrame, list[Excluded]]:
    whole = check_columns(raw, path, integers=("m", "n", "k"))
    return whole.select("m", "n", "k", dtype=pl.lit("fp8_block"), kv_dtype=pl.lit("")), []


def _attention(raw: pl.DataFrame, path: Path, operation: str) -> tuple[pl.DataFrame, list[Excluded]]:
    found = _SIZES.fullmatch(path.stem)
    if found is None:
        msg = f"{path}: the name must be three sizes, such as 32-8-128.csv"
        raise InvalidSpec(msg)
    heads, second, third = (int(size) for size in found.groups())
    is_decode = operation.endswith("decode") or operation == "decode_attention"
    excluded = []
    if operation.startswith("mla"):
        sizes = {"num_heads": heads}
        if (second, third) != _LATENTS["decode" if is_decode else "prefill"]:
            excluded.append(_all_of(path, OTHER_LATENT))
    else:
        sizes = {"num_heads": heads, "num_kv_heads": second, "head_dim": third, "window_tokens": 0}
    kv_name = "kv_dtype" if is_decode else "dtype"
    raw = check_columns(
        raw, path, integers=("batch_size", "kv_len") if is_decode else ("seq_len",), texts=("dtype", kv_name)
    )
    tokens = (
        {"batch": raw["batch_size"], "context_tokens": raw["kv_len"]}
        if is_decode
        else {"batch": pl.lit(1), "prompt_tokens": raw["seq_len"], "context_tokens": raw["seq_len"]}
    )
    return raw.select(
        dtype=rename_values(raw, "dtype", DTYPES, path), kv_dtype=rename_values(raw, kv_name, DTYPES, path),
        **tokens, **{name: pl.lit(size) for name, size in sizes.items()},
    ), excluded  # fmt: skip
