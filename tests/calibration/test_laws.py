"""Laws: positive, never falling, continuous, whatever the parameters, the device and the correction."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.calibration.facts import DeviceFacts
from kvsim.calibration.fit import FittedLaw
from kvsim.calibration.laws import LAWS, law_for
from kvsim.calibration.laws.base import FloatArray, Law, smooth_maximum
from kvsim.calibration.table import CorrectionTable
from kvsim.calibration.timings import SHAPE_COLUMNS

FACTS = DeviceFacts(
    name="made-up",
    bandwidth_bytes_per_s=2e12,
    cache_bytes=40e6,
    half_flops_per_s=3e14,
    flops_per_s={"bf16": 3e14, "fp8": 6e14},
    lane_clocks_per_s=1.5e11,
    link_bytes_per_s=3e11,
)
KEY = {"device": "made-up", "kernel": "made/up", "version": "1", "dtype": "bf16", "kv_dtype": "fp8"}
TYPICAL = {
    "batch": 8.0, "context_tokens": 4096.0, "num_heads": 32.0, "num_kv_heads": 8.0, "head_dim": 128.0,
    "window_tokens": 0.0, "prompt_tokens": 1024.0, "m": 64.0, "n": 4096.0, "k": 4096.0, "ranks": 4.0,
    "message_bytes": 1e6, "read_bytes": 1e6, "written_bytes": 1e5, "flops": 1e6, "units": 1e4,
}  # fmt: skip
MOVES = {
    "decode_attention": (
        ("batch",), ("context_tokens",), ("num_heads",), ("num_heads", "num_kv_heads"), ("head_dim",),
    ),
    "prefill_attention": (
        ("batch",), ("context_tokens",), ("prompt_tokens", "context_tokens"), ("num_heads",), ("num_kv_heads",),
        ("head_dim",),
    ),
    "mla_decode": (("batch",), ("context_tokens",), ("num_heads",)),
    "mla_prefill": (("batch",), ("context_tokens",), ("prompt_tokens", "context_tokens"), ("num_heads",)),
    "gemm": (("m",), ("n",), ("k",)),
    "all_reduce": (("ranks",), ("message_bytes",)),
    "kernel": (("read_bytes",), ("written_bytes",), ("flops",), ("units",)),
}  # fmt: skip
"""What grows together: KV heads with their queries, new tokens on top of what is cached."""
ADDED = {("prompt_tokens", "context_tokens")}
SWEEP = 200


def sweep(
    operation: str, columns: tuple[str, ...], start: dict[str, float], octaves: float = 14.0
) -> dict[str, FloatArray]:
    """Shapes along which `columns` grow."""
    factor = np.exp2(np.linspace(0.0, octaves, SWEEP))
    shape = {name: np.full(SWEEP, start[name]) for name in SHAPE_COLUMNS[operation]}
    if columns in ADDED:
        cached = start["context_tokens"] - start["prompt_tokens"]
        shape["prompt_tokens"] = start["prompt_tokens"] * factor
        shape["context_tokens"] = cached + shape["prompt_tokens"]
        return shape
    for name in columns:
        shape[name] = start[name] * factor
    return shape


def start_of(data: st.DataObject, operation: str) -> dict[str, float]:
    """A small shape to grow from."""
    start = {
        name: TYPICAL[name] * 2.0 ** data.draw(st.floats(-3.0, 1.0), label=name) for name in SHAPE_COLUMNS[operation]
    }
    if "num_heads" in start:
        start["num_heads"] = max(start["num_heads"], 2.0 * start.get("num_kv_heads", 1.0))
    if "prompt_tokens" in start:
        start["context_tokens"] = start["prompt_tokens"] + data.draw(st.floats(0.0, 4096.0), label="cached")
    if "window_tokens" in start:
        start["window_tokens"] = data.draw(st.sampled_from([0.0, 512.0]), label="window")
    return start


def parameters_of(data: st.DataObject, law: Law) -> dict[str, float]:
    """Any parameters within their bounds."""
    return {
        p.name: float(np.exp(data.draw(st.floats(np.log(p.low), np.log(p.high)), label=p.name))) for p in law.parameters
    }


def table_of(data: st.DataObject, law: Law) -> CorrectionTable:
    """Any table, wherever it lies: even one that falls."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="table"))
    counts = rng.integers(1, 4, len(law.features))
    return CorrectionTable(
        tuple(rng.uniform(0.0, 12.0, len(counts)).tolist()), law.spacing, rng.uniform(-1.5, 1.5, counts)
    )


def fitted_of(data: st.DataObject, law: Law) -> FittedLaw:
    """A law as an artefact may hold it."""
    parameters = parameters_of(data, law)
    cached = None
    if law.working_set_bytes(np.zeros((1, len(law.features))), KEY) is not None:
        cached = parameters_of(data, law) | {name: parameters[name] for name in law.per_item_parameters}
    return FittedLaw(law, KEY, FACTS, parameters, table_of(data, law), cached)


@pytest.mark.parametrize("operation", LAWS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_seconds_are_positive_and_never_fall(operation: str, data: st.DataObject) -> None:
    fitted = fitted_of(data, law_for(operation))
    columns = data.draw(st.sampled_from(MOVES[operation]), label="columns")
    seconds = fitted.seconds(sweep(operation, columns, start_of(data, operation)))
    assert np.isfinite(seconds).all()
    assert (seconds > 0).all()
    assert (np.diff(seconds) >= -1e-9 * seconds[:-1]).all()


@pytest.mark.parametrize("operation", LAWS)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_law_alone_never_falls(operation: str, data: st.DataObject) -> None:
    law = law_for(operation)
    fitted = FittedLaw(law, KEY, FACTS, parameters_of(data, law), None)
    for columns in MOVES[operation]:
        seconds = fitted.seconds(sweep(operation, columns, start_of(data, operation)))
        assert (seconds > 0).all()
        assert (np.diff(seconds) >= -1e-9 * seconds[:-1]).all()


@pytest.mark.parametrize("operation", LAWS)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_seconds_are_continuous(operation: str, data: st.DataObject) -> None:
    fitted = fitted_of(data, law_for(operation))
    columns = data.draw(st.sampled_from(MOVES[operation]), label="columns")
    start = start_of(data, operation)
    near = fitted.seconds(sweep(operation, columns, start, octaves=1e-4))
    assert np.abs(np.diff(np.log(near))).max() < 1e-4


def test_moves_name_every_shape_column() -> None:
    for operation, moves in MOVES.items():
        named = {name for move in moves for name in move} | {"window_tokens"}
        assert named >= set(SHAPE_COLUMNS[operation])


@pytest.mark.parametrize("operation", LAWS)
def test_starting_parameters_lie_within_bounds(operation: str) -> None:
    law = law_for(operation)
    assert all(p.low < p.start < p.high for p in law.parameters)
    assert len(law.features) == len(law.spacing)
    assert set(law.per_item_parameters) <= {p.name for p in law.parameters}


def test_a_wider_window_costs_no_less() -> None:
    for operation in ("decode_attention", "prefill_attention"):
        law = law_for(operation)
        shape = {name: np.full(40, TYPICAL[name]) for name in SHAPE_COLUMNS[operation]}
        shape["window_tokens"] = np.exp2(np.linspace(4.0, 13.0, 40))
        seconds = FittedLaw(law, KEY, FACTS, {p.name: p.start for p in law.parameters}, None).seconds(shape)
        without = FittedLaw(law, KEY, FACTS, {p.name: p.start for p in law.parameters}, None).seconds(
            shape | {"window_tokens": np.zeros(40)}
        )
        assert (np.diff(seconds) >= 0).all()
        assert (seconds <= without).all()


def test_smooth_maximum_lies_between_maximum_and_sum() -> None:
    one, other = np.asarray([1.0, 5.0, 0.0]), np.asarray([2.0, 5.0, 3.0])
    result = smooth_maximum(3.0, one, other)
    assert (result >= np.maximum(one, other)).all()
    assert (result <= one + other).all()


def test_thousands_of_gemms_take_milliseconds() -> None:
    law = law_for("gemm")
    table = CorrectionTable((0.0, 5.0, 5.0), law.spacing, np.zeros((31, 12, 12)))
    fitted = FittedLaw(law, KEY, FACTS, {p.name: p.start for p in law.parameters}, table)
    shape = {"m": np.arange(1.0, 8193.0), "n": np.full(8192, 4096.0), "k": np.full(8192, 4096.0)}
    fitted.seconds(shape)
    took_s = min(_timed(lambda: fitted.seconds(shape)) for _ in range(5))
    assert took_s < 0.03


def _timed(call: object) -> float:
    started = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - started
