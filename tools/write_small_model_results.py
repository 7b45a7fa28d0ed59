"""Train the small models where their weights are absent, measure every strategy, write the tables and their page.

Run ``python tools/write_small_model_results.py --work DIR`` with the capture extra installed. It can be stopped and
started again: what lies in DIR is not done twice. ``--fresh`` measures all strategies again, with the weights that are
there; ``--tables-only`` only writes the page from the committed tables.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from small_model_page import write_page

from kvsim.data_files import preset_dir
from kvsim.quality.small_model.grid import MODELS, SEQUENCES

CHECKOUT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Do what the command line asks."""
    options = _options()
    if not options.tables_only:
        _measure(options)
    write_page(CHECKOUT / "docs" / "small-model.md")


def _measure(options: argparse.Namespace) -> None:
    from kvsim.quality.small_model.report import measure_all  # noqa: PLC0415 - needs torch

    outcomes = options.work / "outcomes"
    if options.fresh and outcomes.exists():
        shutil.rmtree(outcomes)
    began = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - began:7.1f} s  {line}", flush=True)

    measure_all(
        options.work / "weights",
        outcomes,
        models=[_model(text) for text in options.models.split(",")] if options.models else MODELS,
        tables=preset_dir("small_model"),
        sequences=options.sequences,
        workers=options.workers,
        report=say,
    )
    say("tables written")


def _model(text: str) -> tuple[str, int]:
    architecture, _, seed = text.partition(":")
    return architecture, int(seed)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of weights and outcomes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--models", help="such as plain:1,smeared:2; else those of small_model/grid.py")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--tables-only", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
