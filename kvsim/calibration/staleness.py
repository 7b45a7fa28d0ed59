"""Whether a measured kernel of kvsim is still the one in this checkout."""

from __future__ import annotations

from functools import lru_cache

from kvsim.data_files import data_dir
from kvsim.documents import load_json

OWN_KERNELS = "kvsim/"
"""How names of kvsim's own kernels begin."""


def is_stale_source(source_sha256: str) -> bool:
    """Whether no compiled kernel of this version of kvsim has that source.

    A beginning of the hash is enough. Where nothing compiled is shipped, nothing can be said and nothing is stale.
    """
    current = current_sources()
    return bool(current) and not any(one.startswith(source_sha256) for one in current)


@lru_cache(maxsize=1)
def current_sources() -> frozenset[str]:
    """Source hashes in ``calibration/compiled``."""
    entries = (load_json(path) for path in data_dir("calibration/compiled").glob("*.json"))
    return frozenset(str(entry["source_sha256"]) for entry in entries if "source_sha256" in entry)
