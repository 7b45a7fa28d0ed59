"""Batches of scenarios: grids, worker processes, result files."""

from kvsim.batch.grid import Sweep, SweepSpec, check_sweep, load_sweep
from kvsim.batch.result_file import read_metadata, write_results
from kvsim.batch.rows import failure_row, report_row, schema, to_frame
from kvsim.batch.run import sweep

__all__ = [
    "Sweep",
    "SweepSpec",
    "check_sweep",
    "failure_row",
    "load_sweep",
    "read_metadata",
    "report_row",
    "schema",
    "sweep",
    "to_frame",
    "write_results",
]
