"""Named workloads: the presets shipped with kvsim."""

from __future__ import annotations

from functools import lru_cache

from kvsim.data_files import preset_dir
from kvsim.documents import load_yaml, validate
from kvsim.errors import UnknownName
from kvsim.specs.workload import SyntheticWorkload, WorkloadSpec


@lru_cache(maxsize=1)
def list_workloads() -> tuple[str, ...]:
    """Names of the presets, sorted."""
    return tuple(sorted(path.stem for path in preset_dir("workloads").glob("*.yaml")))


@lru_cache(maxsize=64)
def load_workload(name: str) -> WorkloadSpec:
    """Read one preset; raise UnknownName with suggestions, InvalidSpec where its file is wrong."""
    if name not in list_workloads():
        raise UnknownName(kind="workload", name=name, known=list_workloads())
    path = preset_dir("workloads") / f"{name}.yaml"
    return validate(SyntheticWorkload, load_yaml(path), path.name, require_units=True)
