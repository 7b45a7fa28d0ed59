"""All-reduce profiles of Vidur: ``<gpu>_<topology>/all_reduce.csv[.gz]``, ms by bytes, fp16 over NCCL.

The profiler runs NCCL eagerly and takes kernel times from the torch profiler; three runs give a median of whole
microseconds, so that small messages are rough. ``size`` is two bytes times the number of elements.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import polars as pl

from kvsim.calibration.device_names import resolve_device
from kvsim.calibration.sources.frames import (
    MS,
    build_timings,
    check_columns,
    file_origin,
    keep,
    merge,
    nothing_found,
    read_csv,
)
from kvsim.calibration.timings import Excluded, Timings
from kvsim.errors import UnknownName

ORIGIN = "Vidur network profiles (Microsoft), github.com/microsoft/vidur"
LICENCE = "MIT"
VERSION = "unstated"
ACROSS_NODES = "all-reduce across nodes"
OTHER_COLLECTIVE = "collective other than all-reduce"
TOPOLOGIES: Mapping[str, tuple[str, str]] = {
    "a100_dgx": ("a100-sxm-80gb", "vidur/nccl_dgx"),
    "h100_dgx": ("h100-sxm", "vidur/nccl_dgx"),
    "a100_pairwise_nvlink": ("a100-pcie-80gb", "vidur/nccl_pairwise"),
    "h100_pairwise_nvlink": ("h100-pcie", "vidur/nccl_pairwise"),
}
"""Device and kernel by folder; GPUs that NVLink joins in pairs are PCIe cards with a bridge."""
_TIME = "time_stats.all_reduce.median"


def find_tables(folder: Path) -> list[Path]:
    """Profiles under `folder`, sorted."""
    paths = [folder] if folder.is_file() else sorted(folder.rglob("all_reduce.csv*"))
    return [path for path in paths if path.name in ("all_reduce.csv", "all_reduce.csv.gz")]


def read(
    folder: Path, devices: Collection[str] | None = None, operations: Collection[str] | None = None
) -> list[Timings]:
    """Read every profile under `folder`; arguments and errors as in `aiconfigurator.read`."""
    wanted = None if devices is None else {resolve_device(name, "devices") for name in devices}
    paths = find_tables(folder)
    if not paths:
        raise nothing_found(folder, "Vidur profile (<gpu>_<topology>/all_reduce.csv)")
    parts: list[Timings] = []
    for path in paths:
        topology = path.absolute().parent.name
        if topology not in TOPOLOGIES:
            raise UnknownName(kind="topology", name=topology, known=TOPOLOGIES, where=f"{path}: folder")
        device, kernel = TOPOLOGIES[topology]
        if (wanted is None or device in wanted) and (operations is None or "all_reduce" in operations):
            parts.extend(_read_table(path, folder, device, kernel))
    return merge(parts)


def _read_table(path: Path, folder: Path, device: str, kernel: str) -> list[Timings]:
    raw = check_columns(
        read_csv(path), path, integers=("num_workers", "devices_per_node", "size"), numbers=(_TIME,),
        texts=("collective",),
    )  # fmt: skip
    excluded: list[Excluded] = []
    shown = ("num_workers", "devices_per_node", "size")
    raw = keep(raw, pl.col("collective") == "all_reduce", OTHER_COLLECTIVE, excluded, shown)
    raw = keep(raw, pl.col("num_workers") <= pl.col("devices_per_node"), ACROSS_NODES, excluded, shown)
    frame = raw.select(
        device=pl.lit(device), operation=pl.lit("all_reduce"), kernel=pl.lit(kernel), version=pl.lit(VERSION),
        dtype=pl.lit("fp16"), kv_dtype=pl.lit(""), ranks="num_workers", message_bytes="size",
        seconds=pl.col(_TIME) * MS,
    )  # fmt: skip
    return build_timings("all_reduce", frame, excluded, [file_origin(path, folder, ORIGIN, LICENCE)])
