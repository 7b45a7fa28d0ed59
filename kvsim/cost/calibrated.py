"""Prices of fitted kernels as tables: evaluated once at nodes, interpolated, never falling and never above the peak.

Nodes are dense where engines run (every small batch, every captured size) and eight to an octave beyond.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from kvsim.cost.kernels import AttentionShape, FloatArray, Kernel
from kvsim.cost.priors import Edge
from kvsim.cost.shapes import Gemm
from kvsim.ops import Numeric

MAX_ROWS = 2**17
"""Largest node; beyond it the last slope goes on."""
PREFILL_OCTAVES = (7, 17)
"""Chunks of 2^7 to 2^17 tokens have four nodes to an octave, shorter ones one."""
FIRST_CONTEXT_TOKENS = 64
MAX_CONTEXT_TOKENS = 2**20


class NodeTable:
    """Seconds over a count, linear between nodes and beyond the last."""

    def __init__(self, nodes: FloatArray, seconds: FloatArray) -> None:
        self.nodes, self.seconds = nodes, np.maximum.accumulate(seconds)
        self.slopes = np.diff(self.seconds) / np.diff(nodes)
        self.slopes = np.append(self.slopes, self.slopes[-1])
        self._lists = (nodes.tolist(), self.seconds.tolist(), self.slopes.tolist())

    def __call__(self, count: Numeric) -> Numeric:
        """Seconds of `count`, a number or an array; below the first node as there."""
        if isinstance(count, np.ndarray):
            cell = np.maximum(np.searchsorted(self.nodes, count, side="right") - 1, 0)
            return np.asarray(self.seconds[cell] + np.maximum(count - self.nodes[cell], 0.0) * self.slopes[cell])
        nodes, seconds, slopes = self._lists
        at = bisect_right(nodes, count) - 1
        return float(seconds[at] + (count - nodes[at]) * slopes[at] if at >= 0 else seconds[0])


def row_nodes() -> FloatArray:
    """Row counts at which linear layers and collectives are evaluated."""
    dense = [*range(1, 17), *range(24, 257, 8), *range(272, 513, 16)]
    octaves = 512.0 * 2.0 ** (np.arange(1, 8 * np.log2(MAX_ROWS / 512) + 1) / 8)
    return np.concatenate([np.asarray(dense, dtype=np.float64), np.rint(octaves)])


@dataclass(frozen=True, slots=True)
class CalibratedGemm:
    """A matrix product priced by a fitted kernel."""

    gemm: Gemm
    kernel: Kernel
    table: NodeTable

    def seconds(self, rows: Numeric) -> Numeric:
        """All repetitions for `rows` rows."""
        return self.gemm.count * self.table(rows)


def calibrated_gemm(gemm: Gemm, kernel: Kernel, edge: Edge, *, weight_bits: float) -> CalibratedGemm:
    """Price a dense product by a fitted kernel."""
    return CalibratedGemm(gemm, kernel, _gemm_tables(kernel, gemm.n, gemm.k, weight_bits)[edge])


@lru_cache(maxsize=4096)
def _gemm_tables(kernel: Kernel, n: int, k: int, weight_bits: float) -> dict[Edge, NodeTable]:
    rows = row_nodes()
    edges = kernel.at_edges({"m": rows, "n": np.full(len(rows), float(n)), "k": np.full(len(rows), float(k))})
    # No band and no table promises more than the datasheet.
    facts = kernel.predictor.facts
    moved_s = k * n * weight_bits / 8.0 / facts.bandwidth_bytes_per_s
    computed_s = 2.0 * rows * n * k / max(facts.half_flops_per_s, *facts.flops_per_s.values())
    floor_s = np.maximum(moved_s, computed_s)
    return {edge: NodeTable(rows, np.maximum(seconds, floor_s)) for edge, seconds in edges.items()}


@lru_cache(maxsize=512)
def summed_table(parts: tuple[tuple[int, NodeTable], ...]) -> NodeTable | None:
    """Add up tables over the same nodes, each so many times; None for no tables."""
    if not parts:
        return None
    return NodeTable(parts[0][1].nodes, np.asarray(sum(count * table.seconds for count, table in parts)))


@lru_cache(maxsize=512)
def all_reduce_tables(kernel: Kernel, ranks: int, bytes_per_row: float) -> dict[Edge, NodeTable]:
    """Seconds of one all-reduce of `bytes_per_row` a row, over rows."""
    rows = row_nodes()
    edges = kernel.at_edges({"ranks": np.full(len(rows), float(ranks)), "message_bytes": rows * bytes_per_row})
    return {edge: NodeTable(rows, seconds) for edge, seconds in edges.items()}


class PrefillTable:
    """Seconds of one layer's prefill attention over (chunk tokens, tokens cached before), linear in both within a cell.

    Work is chunk x context + chunk^2 / 2: linear in either, but for the square, whose chord is within 1 % of it.
    """

    def __init__(self, chunks: FloatArray, contexts: FloatArray, seconds: FloatArray) -> None:
        seconds = np.maximum.accumulate(np.maximum.accumulate(seconds, 0), 1)
        self._contexts = contexts.tolist()
        self._columns = [NodeTable(chunks, column) for column in seconds.T]

    def __call__(self, chunk_tokens: Numeric, context_tokens: float) -> Numeric:
        """Seconds of a chunk, or of an array of them, after `context_tokens`."""
        if not context_tokens:
            return self._columns[0](chunk_tokens)
        at = min(max(bisect_right(self._contexts, context_tokens) - 1, 0), len(self._contexts) - 2)
        before, after = self._contexts[at], self._contexts[at + 1]
        share = (context_tokens - before) / (after - before)
        low, high = self._columns[at](chunk_tokens), self._columns[at + 1](chunk_tokens)
        mixed: Numeric = low + share * (high - low)
        return mixed


@lru_cache(maxsize=512)
def prefill_tables(kernel: Kernel, shape: AttentionShape) -> dict[Edge, PrefillTable]:
    """Evaluate a prefill kernel on its grid."""
    first, last = PREFILL_OCTAVES
    chunks = np.concatenate([2.0 ** np.arange(first), 2.0 ** (np.arange(4 * first, 4 * last + 1) / 4)])
    halves = np.arange(0, 2 * np.log2(MAX_CONTEXT_TOKENS / FIRST_CONTEXT_TOKENS) + 1) / 2
    contexts = np.concatenate([[0.0], FIRST_CONTEXT_TOKENS * 2.0**halves])
    chunk, before = (axis.ravel() for axis in np.meshgrid(chunks, contexts, indexing="ij"))
    columns = shape.columns(batch=np.ones(len(chunk)), prompt_tokens=chunk, context_tokens=chunk + before)
    return {
        edge: PrefillTable(chunks, contexts, seconds.reshape(len(chunks), len(contexts)))
        for edge, seconds in kernel.at_edges(columns).items()
    }
