"""kvsim: what a KV-cache compression costs, and what it saves, on a given device under a given load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvsim.batch import sweep
    from kvsim.report import Report
    from kvsim.scenario import Scenario
    from kvsim.scenario_file import load_scenario
    from kvsim.simulate import compare, estimate, simulate

_PUBLIC = {
    "Report": "kvsim.report",
    "Scenario": "kvsim.scenario",
    "compare": "kvsim.simulate",
    "estimate": "kvsim.simulate",
    "load_scenario": "kvsim.scenario_file",
    "simulate": "kvsim.simulate",
    "sweep": "kvsim.batch",
}

__all__ = ["Report", "Scenario", "__version__", "compare", "estimate", "load_scenario", "simulate", "sweep"]


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that ``kvsim --help`` stays fast."""
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    msg = f"module 'kvsim' has no attribute {name!r}"
    raise AttributeError(msg)
