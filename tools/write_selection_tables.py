"""Write the tables of docs/methods/merging.md and head-budgets.md: what selections do to ensembles, and their work.

Run ``python tools/write_selection_tables.py``; it takes some minutes on one core.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kvsim.catalog import resolve
from kvsim.compression import parse_compression
from kvsim.compression.selector import Selector
from kvsim.cost.priors import Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.sequence import SequenceModel
from kvsim.documents import write_atomic
from kvsim.numerics.arrays import IntArray
from kvsim.numerics.head_budgets import fullest_rank
from kvsim.quality.run import run_strategies
from kvsim.quality.store import fit_strategy, needs_calibration
from kvsim.scenario import Scenario
from kvsim.tensors import KvTensors, LayerKv
from kvsim.tensors.ensemble import draw, parse_ensemble
from kvsim.units import TICKS_PER_SECOND

METHODS = Path(__file__).resolve().parents[1] / "docs" / "methods"
BLOCK = r"(<!-- {name}: begin.*? -->\n).*?(<!-- {name}: end -->)"

MERGING = (
    "snapkv:{}", "merging:{}", "merging:{}(similarity_threshold=0.8)", "merging:{}(rule=counts)", "h2o:{}", "cam:{}",
    "d2o:{}",
)  # fmt: skip
PRICED = ("snapkv:0.75", "merging:0.75", "h2o:0.75", "cam:0.75", "d2o:0.75")
PROMPTS = (8192, 32768, 130072)
MODEL, DEVICE = "llama-3.1-8b", "h100-sxm"
MERGING_ENSEMBLES = tuple(
    f"{name}(num_prompt_queries=256)" for name in ("llama-like", "retrieval", "heavy-keys", "diffuse")
)
HEADS = (
    "snapkv:0.75", "adakv:0.75", "expected_attention:0.75", "adakv:0.75(scorer=expected_attention)",
    "duo_attention:0.75", "snapkv:0.5+int8_per_token_head", "rdkv:0.75", "int4_per_token_head", "rdkv:0.9",
    "snapkv:0.9",
)  # fmt: skip
HEADS_ENSEMBLES = tuple(f"{name}(num_kv_heads=8,num_tokens=2048)" for name in ("llama-like", "retrieval", "diffuse"))
RANKED = ("adakv:0.75", "adakv:0.75(scorer=expected_attention)", "duo_attention:0.5")
RANKS = (2, 4, 8)


def merging_strategies() -> tuple[str, ...]:
    """Rows of the page on merging: half of the tokens removed, then three quarters."""
    return tuple(name.format(ratio) for ratio in (0.5, 0.75) for name in MERGING)


def errors(strategies: Sequence[str], ensembles: Sequence[str]) -> Iterator[str]:
    """Bits, and output error on each ensemble: what `kvsim quality run --ensemble NAME -s STRATEGY` shows."""
    columns = []
    for name in ensembles:
        cache, samples = drawn(name)
        columns.append(run_strategies(cache, strategies, lambda found=samples: found, amid=True))
        print(f"measured {name}", flush=True)
    yield "| strategy | bits | " + " | ".join(_short(name) for name in ensembles) + " |"
    yield "|---" * (len(ensembles) + 2) + "|"
    for name, risks in zip(strategies, zip(*columns, strict=True), strict=True):
        found = [risk.measured for risk in risks]
        bits = f"{found[0].bits_per_element:.2f}" if found[0] else "?"
        yield f"| `{name}` | {bits} | " + " | ".join(f"{one.output_error:.3f}" if one else "?" for one in found) + " |"


def ranks(ensembles: Sequence[str]) -> Iterator[str]:
    """Tokens of the fullest rank over the mean, by number of ranks: mean over layers, largest in brackets."""
    yield "| fullest rank / mean | " + " | ".join(f"{count} ranks" for count in RANKS) + " |"
    yield "|---" * (len(RANKS) + 1) + "|"
    for strategy in RANKED:
        for name in ensembles:
            cache, samples = drawn(name)
            layers = selector_of(strategy, samples).select(cache).layers
            cells = []
            for count in RANKS:
                shares = [fullest_rank(tokens_per_head(layer), count) for layer in layers]
                cells.append(f"{np.mean(shares):.2f} ({max(shares):.2f})")
            yield f"| `{strategy}`, {_short(name)} | " + " | ".join(cells) + " |"


def work() -> Iterator[str]:
    """Time to compress one prompt after prefill, by its length."""
    yield "| prompt | " + " | ".join(f"`{name}`" for name in PRICED) + " |"
    yield "|---" * (len(PRICED) + 1) + "|"
    priced = [_priced(name) for name in PRICED]
    for prompt in PROMPTS:
        seconds = [one.profile(prompt).compress_ticks / TICKS_PER_SECOND for one in priced]
        yield f"| {prompt:,} | " + " | ".join(f"{float(f'{1e3 * one:.3g}'):,g} ms" for one in seconds) + " |"


def _priced(strategy: str) -> SequenceModel:
    deployment = resolve(Scenario(model=MODEL, device=DEVICE, workload="chat", compression=parse_compression(strategy)))
    return SequenceModel(deployment, build_rates(deployment.device, deployment.priors, Edge.CENTRAL))


def drawn(name: str) -> tuple[KvTensors, list[KvTensors]]:
    """Sequence 0, and sequences 1 and 2 to calibrate on."""
    spec, seed = parse_ensemble(name)
    cache, *samples = (draw(spec, seed, sequence=number) for number in range(3))
    return cache, samples


def selector_of(strategy: str, samples: Sequence[KvTensors]) -> Selector:
    """Give the algorithm of a strategy's selection, fitted where it learns."""
    compression = parse_compression(strategy)
    return fit_strategy(compression, samples if needs_calibration(compression) else ()).selector


def tokens_per_head(layer: LayerKv) -> IntArray:
    """Tokens that each KV head of a layer keeps, (H,)."""
    if layer.log_weights is None:
        return np.full(layer.num_kv_heads, layer.num_tokens)
    return np.isfinite(layer.log_weights).sum(axis=1)


def _short(name: str) -> str:
    return name.partition("(")[0]


def _write(page: str, name: str, lines: Iterator[str]) -> None:
    path = METHODS / page
    text = path.read_text(encoding="utf-8")
    body = "\n".join(lines)
    pattern = re.compile(BLOCK.format(name=name), re.DOTALL)
    write_atomic(path, pattern.sub(lambda found: f"{found[1]}{body}\n{found[2]}", text).encode())
    print(f"wrote {name} of {page}")


if __name__ == "__main__":
    _write("head-budgets.md", "ranks", ranks(HEADS_ENSEMBLES[:2]))
    _write("head-budgets.md", "errors", errors(HEADS, HEADS_ENSEMBLES))
    _write("merging.md", "work", work())
    _write("merging.md", "errors", errors(merging_strategies(), MERGING_ENSEMBLES))
