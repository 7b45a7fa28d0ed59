"""Write the tables of docs/methods/minimax.md: what compressors really do, beside the rates.

``OMP_NUM_THREADS=1 python tools/write_risk.py`` measures on ensembles (minutes on one core) and keeps the small models'
table; ``--small-model DIR`` measures on caches of trained small models in DIR (needs torch) and keeps the other.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvsim.compression.selection.weighted_atoms import prompt_queries
from kvsim.documents import write_atomic
from kvsim.numerics.query_samples import isotropic_queries, resolved_spread
from kvsim.numerics.weighted_atoms import Atoms, AtomStream, Compressor
from kvsim.quality.dropping import random_eviction_error
from kvsim.quality.risk.comparators import (
    Entries,
    heavy_hitters,
    pivoted_cholesky,
    random_eviction,
    squared_error,
    squared_output,
    uniform_sample,
)
from kvsim.quality.risk.compressibility import head_view
from kvsim.quality.risk.influence import HeadView, Spectrum, spectrum
from kvsim.quality.risk.thinning import thinned
from kvsim.tensors import KvTensors
from kvsim.tensors.ensemble import draw, preset

CHECKOUT = Path(__file__).resolve().parents[1]
PAGE = CHECKOUT / "docs" / "methods" / "minimax.md"
SEED = 10
"""The design was chosen on seeds 0 to 2 at 2,048 tokens."""
TOKENS = 8192
COUNTS = (16, 64, 256, 1024, 4096)
DRAWS = 5
MOST_CHOLESKY = 1024
MOST_THINNED_TOKENS = 8192
SHAPE = {"num_layers": 1, "num_kv_heads": 2, "num_tokens": TOKENS}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama-like": ("llama-like", {"retrieval_heads": 0.0, "num_needles": 0}),
    "heavy-keys": ("heavy-keys", {"retrieval_heads": 0.0, "num_needles": 0}),
    "retrieval, question unseen": ("retrieval", {"retrieval_heads": 1.0}),
    "retrieval, question seen": ("retrieval", {"retrieval_heads": 1.0, "question_visible": True}),
    "diffuse": ("diffuse", {}),
    "diffuse, 16,384 tokens": ("diffuse", {"num_tokens": 16384}),
}
"""Name -> ensemble and what is changed in it: every case has KV heads of one kind."""
SMALL_COUNTS = (16, 32, 64, 128)
SMALL_MODELS = (("plain", 1), ("smeared", 1), ("smeared", 2))
SMALL_SEQUENCES = 2
Measure = Callable[[HeadView, np.ndarray, int], float | None]


def averaged(make: Callable[[HeadView, int, np.random.Generator], Entries]) -> Measure:
    """Mean squared error over seeded draws."""

    def measure(view: HeadView, _sample: np.ndarray, count: int) -> float:
        return float(np.mean([squared_error(view, make(view, count, np.random.default_rng(n))) for n in range(DRAWS)]))

    return measure


def atoms(view: HeadView, sample: np.ndarray, count: int, **options: object) -> float:
    """Squared error of weighted atoms made for the sample's queries."""
    compressor = Compressor(sample, view.attention_scale, **options)  # type: ignore[arg-type]
    return squared_error(view, Entries.of_atoms(compressor.compress(Atoms.of_tokens(view.keys, view.values), count)))


def blocks(view: HeadView, sample: np.ndarray, count: int) -> float:
    """Parallel form, in blocks of 1,024 tokens or twice the atoms."""
    compressor = Compressor(sample, view.attention_scale)
    tokens = Atoms.of_tokens(view.keys, view.values)
    return squared_error(view, Entries.of_atoms(compressor.compress_blocks(tokens, count, max(1024, 2 * count))))


def stream(view: HeadView, sample: np.ndarray, count: int) -> float:
    """Streaming form with a buffer of as many tokens as atoms."""
    held = AtomStream(Compressor(sample, view.attention_scale), count, count)
    held.append(view.keys, view.values)
    return squared_error(view, Entries.of_atoms(held.compressor.compress(held.atoms, count)))


def agnostic(view: HeadView, _sample: np.ndarray, count: int) -> float:
    """Weighted atoms for isotropic queries."""
    spread = resolved_spread(len(view.keys), count)
    return atoms(view, isotropic_queries(view.keys, view.attention_scale, 64, spread), count)


def cholesky(view: HeadView, sample: np.ndarray, count: int) -> float | None:
    """Random-pivoted Cholesky, one draw; not where it takes minutes."""
    if count > MOST_CHOLESKY:
        return None
    return squared_error(view, pivoted_cholesky(view, count, sample, np.random.default_rng(0)))


def thinning(view: HeadView, sample: np.ndarray, count: int) -> float | None:
    """Kernel thinning, one draw; not where its kernel takes gigabytes, or n / K is no power of two."""
    tokens = len(view.keys)
    if tokens > MOST_THINNED_TOKENS or tokens % count or (tokens // count) & (tokens // count - 1):
        return None
    return squared_error(view, thinned(view, count, sample, np.random.default_rng(0)))


def finite_form(view: HeadView, _sample: np.ndarray, count: int) -> float:
    """Random eviction by the finite-influence formula."""
    shares, _ = view.attention()
    return float(random_eviction_error(shares[None], view.values[None], count)[1].mean())


MEASURES: dict[str, Measure] = {
    "weighted atoms": atoms,
    "blocks": blocks,
    "streaming": stream,
    "count weights": lambda view, sample, count: atoms(view, sample, count, weighting="count"),
    "clusters only": lambda view, sample, count: atoms(view, sample, count, heavy_fraction=0.0),
    "agnostic": agnostic,
    "heavy hitters": lambda view, sample, count: squared_error(view, heavy_hitters(view, count, sample)),
    "thinning": thinning,
    "Cholesky": cholesky,
    "uniform": averaged(uniform_sample),
    "random": averaged(random_eviction),
}
RATES: dict[str, tuple[str, Callable[[Spectrum, int, int], float]]] = {
    "weighted atoms": ("tail_{K/3}(Σ)/K", lambda found, count, _tokens: found.query_aware_rate(count)),
    "agnostic": ("tr(Σ)/K", lambda found, count, _tokens: found.query_agnostic_rate(count)),
    "streaming": ("log(2+t/K)/K · tr(Σ)", lambda found, count, tokens: found.streaming_rate(count, tokens)),
    "uniform": ("tr(Σ)/K", lambda found, count, _tokens: found.query_agnostic_rate(count)),
}


@dataclass(frozen=True)
class Cell:
    """Squared errors of all ways at one K, beside outputs and rates; means over heads."""

    case: str
    count: int
    size: float
    errors: dict[str, float | None]
    rates: dict[str, float]
    formula: float


def measure_case(case: str, heads: Iterable[tuple[HeadView, np.ndarray]], counts: Iterable[int]) -> list[Cell]:
    """Run every way at every K on heads with the queries that a compressor may know."""
    known = [(view, sample, spectrum(view), squared_output(view)) for view, sample in heads]
    cells = []
    for count in counts:
        print(f"{case}: K = {count}", file=sys.stderr)
        errors = {
            name: _mean([run(view, sample, count) for view, sample, *_ in known]) for name, run in MEASURES.items()
        }
        rates = {
            name: float(np.mean([rate(found, count, len(view.keys)) for view, _, found, _ in known]))
            for name, (_, rate) in RATES.items()
        }
        formula = float(np.mean([finite_form(view, sample, count) for view, sample, *_ in known]))
        cells.append(Cell(case, count, float(np.mean([size for *_, size in known])), errors, rates, formula))
    return cells


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def heads_of(kv: KvTensors) -> Iterator[tuple[HeadView, np.ndarray]]:
    """Every KV head of a cache."""
    for layer in kv.layers:
        for head in range(layer.num_kv_heads):
            yield head_view(layer, head, kv.attention_scale), prompt_queries(layer, head, 64)


def ensemble_case(case: str, counts: tuple[int, ...] = COUNTS, tokens: int | None = None) -> list[Cell]:
    """Draw a case and measure it."""
    name, changes = CASES[case]
    shape = SHAPE | changes | ({} if tokens is None else {"num_tokens": tokens})
    return measure_case(case, heads_of(draw(preset(name, **shape), SEED)), counts)


def small_model_cases(folder: Path) -> Iterator[Cell]:
    """Caches of trained models: some sequences of each task, with the queries of their questions and answers."""
    from kvsim.quality.small_model.caches import calibration_caches  # noqa: PLC0415 (torch)
    from kvsim.quality.small_model.tasks import TASKS, generate  # noqa: PLC0415 (torch)
    from kvsim.quality.small_model.weights import load_or_train  # noqa: PLC0415 (torch)

    for task in TASKS:
        heads: list[tuple[HeadView, np.ndarray]] = []
        for architecture, seed in SMALL_MODELS:
            rng = np.random.default_rng((40_000, sorted(TASKS).index(task), seed))
            batch = generate(task, rng, SMALL_SEQUENCES, 256, 1)
            for kv in calibration_caches(load_or_train(architecture, seed, folder).model, [batch]):
                heads += heads_of(kv)
        yield from measure_case(task, heads, SMALL_COUNTS)


def error_table(cells: Iterable[Cell]) -> Iterator[str]:
    """Relative errors, root mean square."""
    yield f"| cache | K | {' | '.join(MEASURES)} | random, by formula |"
    yield f"|---|---|{'---|' * (len(MEASURES) + 1)}"
    for cell in cells:
        shown = [_relative(cell.errors[name], cell.size) for name in MEASURES]
        known = [error for error in cell.errors.values() if error is not None]
        best = _relative(min(known), cell.size)
        marked = [f"**{text}**" if text == best else text for text in shown]
        yield f"| {cell.case} | {cell.count:,} | {' | '.join(marked)} | {_relative(cell.formula, cell.size)} |"


def _relative(error: float | None, size: float) -> str:
    return "-" if error is None else f"{math.sqrt(error / size):.3f}"


def rate_table(cells: list[Cell]) -> Iterator[str]:
    """Measured squared error over its rate: mean of logs and span over K, and where it is above 1."""
    yield "| cache | " + " | ".join(f"{name} over {rate}" for name, (rate, _) in RATES.items()) + " |"
    yield f"|---|{'---|' * len(RATES)}"
    cases = list(dict.fromkeys(cell.case for cell in cells))
    for case in (*cases, "all"):
        chosen = [cell for cell in cells if case in (cell.case, "all")]
        yield f"| {case} | {' | '.join(_constant(chosen, name) for name in RATES)} |"


def _constant(cells: list[Cell], name: str) -> str:
    ratios = []
    for cell in cells:
        error = cell.errors[name]
        if error is not None and cell.rates[name] > 0.0:
            ratios.append(error / cell.rates[name])
    if not ratios:
        return "rate is 0"
    middle, above = float(np.exp(np.mean(np.log(ratios)))), sum(ratio > 1.0 for ratio in ratios)
    without = len(cells) - len(ratios)
    note = f"; rate 0 in {without}" if without else ""
    return f"{middle:.2g} ({min(ratios):.2g} to {max(ratios):.2g}; {above} of {len(ratios)} above 1{note})"


def block(name: str, lines: Iterable[str], text: str) -> str:
    """Put lines between the page's markers of that name."""
    marker = re.compile(rf"(<!-- {name}: begin.*? -->\n).*?(<!-- {name}: end -->)", re.DOTALL)
    body = "\n".join(lines)
    return marker.sub(lambda found: f"{found[1]}\n{body}\n\n{found[2]}", text)


def main(arguments: list[str]) -> None:
    """Measure, and write the page."""
    if arguments[:1] == ["--small-model"]:
        cells = list(small_model_cases(Path(arguments[1])))
        blocks_of = {"small models": [*error_table(cells), "", *rate_table(cells)]}
    else:
        with ProcessPoolExecutor(max_workers=2) as pool:
            cells = [cell for found in pool.map(ensemble_case, CASES) for cell in found]
        blocks_of = {"ensembles": list(error_table(cells)), "rates": list(rate_table(cells))}
    # Measuring takes minutes, so the page is read when it is written.
    text = PAGE.read_text(encoding="utf-8")
    for name, lines in blocks_of.items():
        text = block(name, lines, text)
    write_atomic(PAGE, text.encode())


if __name__ == "__main__":
    main(sys.argv[1:])
