"""Priors beside the kernel tables of aiconfigurator-core, after the quarantine of the tables' own SOURCE.md.

The priors were read off these tables, so this checks the form of the cost model, not its power to predict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from kvsim.cost.collectives import all_reduce_seconds
from kvsim.cost.estimator import (
    attention_seconds_per_token,
    prefill_attention_seconds,
    price_gemm,
    query_key_pairs,
)
from kvsim.cost.priors import Edge, load_priors
from kvsim.cost.rates import Rates, build_rates
from kvsim.cost.shapes import Gemm
from kvsim.device_catalog import load_device
from kvsim.specs.base import Dtype

FloatArray = npt.NDArray[np.float64]
EDGES = (Edge.CENTRAL, Edge.OPTIMISTIC, Edge.PESSIMISTIC)
HEAD_DIM = 128
ELEMENT_BYTES = 2
ROOMS = (("1-8", 1, 8), ("9-64", 9, 64), ("65-512", 65, 512), ("513 and more", 513, 10**9))


@dataclass(frozen=True)
class Gpu:
    """A GPU of the tables: its spec, its L2 cache, and its attention tables that are not quarantined."""

    folder: str
    device: str
    l2_bytes: float
    decode_tables: tuple[str, ...]
    prefill_tables: tuple[str, ...]

    def rates(self, edge: Edge) -> Rates:
        """Rates at an edge of the priors."""
        return build_rates(load_device(self.device).spec, load_priors(), edge)


GPUS = (
    Gpu("a100_sxm", "a100-sxm-80gb", 40e6, ("vllm/0.14.0",), ("vllm/0.14.0", "sglang/0.5.10")),
    Gpu("h100_sxm", "h100-sxm", 50e6, ("vllm/0.24.0", "trtllm/1.3.0rc20"), ("vllm/0.24.0", "sglang/0.5.14")),
    Gpu("b200_sxm", "b200-sxm", 126e6, ("vllm/0.24.0", "trtllm/1.3.0rc20"), ("vllm/0.24.0", "sglang/0.5.14")),
    Gpu("l40s", "l40s", 96e6, ("vllm/0.24.0", "trtllm/1.3.0rc20"), ("vllm/0.24.0", "sglang/0.5.14")),
)  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """Errors over the rows of some tables: signed median, mean of magnitudes, share of rows within the edges."""

    name: str
    rows: int
    median: float
    mean_magnitude: float
    in_band: float


def _fit(name: str, measured_s: FloatArray, priced: Callable[[Edge], FloatArray]) -> Fit:
    central, fast, slow = (priced(edge) for edge in EDGES)
    errors = central / measured_s - 1.0
    inside = (fast <= measured_s) & (measured_s <= slow)
    return Fit(name, len(errors), float(np.median(errors)), float(np.abs(errors).mean()), float(inside.mean()))


def gemm_fits(shared: Path) -> Iterator[Fit]:
    """bf16 GEMMs of 16 M weights and more, by rows."""
    for gpu in GPUS:
        folder = shared / "kernel_timings" / gpu.folder / "gemm"
        table = pl.concat(_gemm_table(path) for path in sorted(folder.glob("*/*/gemm_perf.parquet")))
        for room, low, high in ROOMS:
            part = table.filter(pl.col("m").is_between(low, high))
            rows, k, n, measured_s = _columns(part, ("m", "k", "n", "latency"))

            def priced(
                edge: Edge, gpu: Gpu = gpu, rows: FloatArray = rows, k: FloatArray = k, n: FloatArray = n
            ) -> FloatArray:
                rates = gpu.rates(edge)
                shapes = [(int(one), int(other)) for one, other in zip(k, n, strict=True)]
                seconds = {
                    shape: price_gemm(Gemm("", *shape, 1), rates, weight_bits=16.0, compute=Dtype.BF16)
                    for shape in set(shapes)
                }
                return np.array([seconds[shape].seconds(float(m)) for shape, m in zip(shapes, rows, strict=True)])

            yield _fit(f"{gpu.device}, {room} rows", measured_s / 1e3, priced)


def _gemm_table(path: Path) -> pl.DataFrame:
    table = pl.read_parquet(path, columns=["gemm_dtype", "m", "n", "k", "latency"])
    bounded = (pl.col("n") < 65_536) & (pl.col("k") < 65_536) & (pl.col("n") * pl.col("k") >= 4096 * 4096)
    return table.filter((pl.col("gemm_dtype") == "bfloat16") & bounded)


def decode_attention_fits(shared: Path) -> Iterator[Fit]:
    """Decode attention, head_dim 128, no window, with a cache of more than twice L2."""
    for gpu in GPUS:
        for table in gpu.decode_tables:
            path = shared / "kernel_timings" / gpu.folder / "attention" / table / "generation_attention_perf.parquet"
            for kv_dtype, element_bytes in (("bfloat16", 2.0), ("fp8", 1.0)):
                rows = _attention_rows(path, kv_dtype)
                cached = (
                    rows["batch_size"] * (rows["step"] + 1) * rows["num_key_value_heads"] * 2 * HEAD_DIM * element_bytes
                )
                rows = rows.filter(cached > 2 * gpu.l2_bytes)
                if rows.is_empty():
                    continue
                columns = _columns(rows, ("batch_size", "step", "num_heads", "num_key_value_heads", "latency"))

                def priced(
                    edge: Edge, gpu: Gpu = gpu, columns: tuple[FloatArray, ...] = columns, size: float = element_bytes
                ) -> FloatArray:
                    batch, step, heads, kv_heads = columns[:4]
                    return _decode_attention(gpu.rates(edge), batch, step, heads, kv_heads, size)

                yield _fit(f"{gpu.device}, {table}, {kv_dtype}", columns[4] / 1e3, priced)


def _decode_attention(
    rates: Rates, batch: FloatArray, step: FloatArray, heads: FloatArray, kv_heads: FloatArray, element_bytes: float
) -> FloatArray:
    def token_s(head: float, kv_head: float) -> float:
        elements = kv_head * 2 * HEAD_DIM
        whole_s, _ = attention_seconds_per_token(
            stored_bytes=elements * element_bytes, elements=elements, flops=4.0 * head * HEAD_DIM, extra_flops=0.0,
            family="fp8" if element_bytes == 1 else None, group_size=head / kv_head, compute=Dtype.BF16, rates=rates,
        )  # fmt: skip
        return whole_s

    pairs = list(zip(heads, kv_heads, strict=True))
    prices = {pair: token_s(*pair) for pair in set(pairs)}
    per_token = np.array([prices[pair] for pair in pairs])
    floor_s = rates.attention_launch_s + batch * rates.attention_per_sequence_s
    return np.asarray(floor_s + batch * (step + 1) * per_token)


def prefill_attention_fits(shared: Path) -> Iterator[Fit]:
    """Causal prefill attention, head_dim 128, 512 tokens and more, whole and (where measured) with a window of 128."""
    for gpu in GPUS:
        for table in gpu.prefill_tables:
            path = shared / "kernel_timings" / gpu.folder / "attention" / table / "context_attention_perf.parquet"
            for window in (None, 128):
                rows = _attention_rows(path, "bfloat16", window or 0).filter(
                    (pl.col("isl") >= 512) & (pl.col("num_heads") >= 8) & (pl.col("batch_size") <= 16)
                )
                if rows.is_empty():
                    continue
                batch, length, heads, measured_ms = _columns(rows, ("batch_size", "isl", "num_heads", "latency"))

                def priced(
                    edge: Edge, gpu: Gpu = gpu, batch: FloatArray = batch, length: FloatArray = length,
                    heads: FloatArray = heads, window: int | None = window,
                ) -> FloatArray:  # fmt: skip
                    queries, pairs = batch * length, batch * query_key_pairs(length, 0, window)
                    rates = gpu.rates(edge)
                    computed = [
                        float(prefill_attention_seconds(query, pair, 4.0 * head * HEAD_DIM, rates))
                        for query, pair, head in zip(queries, pairs, heads, strict=True)
                    ]
                    return np.array(computed)

                suffix = f", window {window}" if window else ""
                yield _fit(f"{gpu.device}, {table}{suffix}", measured_ms / 1e3, priced)


def all_reduce_fits(shared: Path) -> Iterator[Fit]:
    """Custom all-reduce replayed from a CUDA graph, 16 KB to 256 MB; message_size counts 2-byte elements."""
    for gpu in GPUS:
        folder = shared / "kernel_timings" / gpu.folder / "comm"
        for ranks in (2, 4, 8):
            parts = [_reduce_table(path, ranks) for path in sorted(folder.glob("*/*/custom_allreduce_perf.parquet"))]
            size, measured_ms = _columns(pl.concat(parts), ("message_size", "latency"))

            def priced(edge: Edge, gpu: Gpu = gpu, ranks: int = ranks, size: FloatArray = size) -> FloatArray:
                return np.asarray(all_reduce_seconds(size * ELEMENT_BYTES, ranks, gpu.rates(edge)))

            yield _fit(f"{gpu.device}, {ranks} ranks", measured_ms / 1e3, priced)


def _reduce_table(path: Path, ranks: int) -> pl.DataFrame:
    table = pl.read_parquet(path)
    if "backend" in table.columns:
        table = table.filter(pl.col("backend").str.ends_with("_graph"))
    sized = pl.col("message_size").is_between(2**13, 2**27)
    return table.filter((pl.col("num_gpus") == ranks) & sized).select("message_size", "latency")


def _attention_rows(path: Path, kv_dtype: str, window_tokens: int = 0) -> pl.DataFrame:
    table = pl.read_parquet(path)
    if "window_size" not in table.columns:
        table = table.with_columns(pl.lit(0).alias("window_size"))
    return table.filter(
        (pl.col("attn_dtype") == "bfloat16") & (pl.col("kv_cache_dtype") == kv_dtype) & (pl.col("head_dim") == HEAD_DIM)
        & (pl.col("window_size") == window_tokens)
    )  # fmt: skip


def _columns(table: pl.DataFrame, names: tuple[str, ...]) -> tuple[FloatArray, ...]:
    return tuple(table[name].to_numpy().astype(np.float64) for name in names)
