"""Rows not to fit: each rule has a name, and every row that it takes out is counted under that name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from kvsim.calibration.facts import DeviceFacts
from kvsim.calibration.least_work import FloatArray, LeastWork, least_work
from kvsim.calibration.timings import KEY_COLUMNS, SHAPE_COLUMNS, Excluded, Timings
from kvsim.errors import CalibrationError

BAD_SECONDS = "seconds not finite and positive"
MISSING_VALUE = "missing value"
IMPOSSIBLE_SHAPE = "impossible shape"
ABOVE_BANDWIDTH = "above peak bandwidth"
ABOVE_FLOPS = "above peak FLOPS"
ANOTHER_UNIT = "1000 times slower or 20 times faster than the datasheet, as in another unit"
TOO_FEW_ROWS = "too few rows"

MARGIN = 1.05
"""Above the datasheet's rate by this much is impossible: datasheets round, and clocks boost a little beyond them."""
COLD_CACHES = 2.0
"""Bandwidth is judged where the working set exceeds this many caches; smaller ones are served from cache."""
SLOWEST, FASTEST = 300.0, 0.05
"""Seconds over roofline and launch: real tables have medians of 1.1 to 35, and a wrong unit shifts them 1000-fold."""
WRONG_UNIT_SHARE = 0.25
"""More rows than this outside those bounds are a table in another unit; fewer are rows in another unit, if so slow:"""
HOPELESS = 1000.0
LAUNCH_S = 5e-6
MAY_BE_ZERO = ("window_tokens", "written_bytes", "flops", "read_bytes", "units")


@dataclass(frozen=True)
class KnownFault:
    """Rows of a tool that are known to be wrong, whatever they say.

    Attributes
    ----------
    kernel : str
        How the kernel's name begins.
    versions : callable
        Whether a version is at fault.
    dtypes : tuple of str
        Where given, only rows that multiply in or store K and V in one of these.
    """

    reason: str
    kernel: str
    operations: tuple[str, ...]
    versions: Callable[[str], bool]
    devices: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()

    def condition(self, frame: pl.DataFrame) -> pl.Expr:
        """Rows at fault."""
        versions = [version for version in frame["version"].unique().to_list() if self.versions(version)]
        found = pl.col("kernel").str.starts_with(self.kernel) & pl.col("version").is_in(versions)
        found &= pl.col("operation").is_in(list(self.operations))
        if self.devices:
            found &= pl.col("device").is_in(list(self.devices))
        if self.dtypes:
            found &= pl.col("dtype").is_in(list(self.dtypes)) | pl.col("kv_dtype").is_in(list(self.dtypes))
        return found


def is_older(version: str, than: str) -> bool:
    """Compare versions such as ``1.3.0rc10``; one that is not of that form counts as older."""
    return _version_key(version) < _version_key(than)


def _version_key(version: str) -> tuple[tuple[int, ...], float]:
    found = re.match(r"(\d+(?:\.\d+)*)(?:rc(\d+))?", version)
    if found is None:
        return (), 0.0
    return tuple(int(part) for part in found[1].split(".")), float(found[2] or "inf")


def _always(version: str) -> bool:
    return True


_ATTENTION = ("decode_attention", "prefill_attention")
_FP8 = ("fp8", "fp8_block")
KEYS_ONLY = "TRT-LLM generation rows before 1.3.0rc20: only K was cached"
NO_NATIVE_FP8 = "Intel B60 fp8 rows: the device has no FP8"
FP8_NOT_USED = "TRT-LLM 1.0.0 MLA fp8 rows: they repeat the bf16 times"
KNOWN_FAULTS = (
    # aiconfigurator's commit dec5f4cd2 (2026-08-03) fixed CacheType.SELFKONLY; GQA rows before reach 116-165 % of peak.
    KnownFault(KEYS_ONLY, "trtllm/", ("decode_attention",), lambda version: is_older(version, "1.3.0rc20")),
    KnownFault(
        "L40S SGLang 0.5.12 attention: 260 times the peak bandwidth", "sglang/", _ATTENTION,
        lambda version: version == "0.5.12", devices=("l40s",),
    ),
    KnownFault(
        "L40S vLLM 0.14 fp8 prefill: 165 % of peak FLOPS", "vllm/", ("prefill_attention",),
        lambda version: version.startswith("0.14."), devices=("l40s",), dtypes=_FP8,
    ),
    KnownFault(NO_NATIVE_FP8, "vllm/", (*_ATTENTION, "gemm"), _always, devices=("arc-pro-b60",), dtypes=_FP8),
    # On A100 and L40S alike the median of fp8 over bf16 time is 1.00 also where memory binds: KV stayed in bf16.
    KnownFault(
        FP8_NOT_USED, "trtllm/", ("mla_decode", "mla_prefill"), lambda version: version == "1.0.0", dtypes=_FP8
    ),
)  # fmt: skip
"""From the tables' own SOURCE.md and reference/timings.md 3.2, and one found here."""


def exclude(
    frame: pl.DataFrame, condition: pl.Expr, reason: str, columns: Sequence[str] = ()
) -> tuple[pl.DataFrame, tuple[Excluded, ...]]:
    """Split off rows that meet `condition`; a null in it counts as met.

    Returns
    -------
    tuple
        The rows that stay, and their exclusion by name with the first row as example; nothing where none is split off.
    """
    taken = frame.select(condition.fill_null(True)).to_series()
    count = int(taken.sum())
    if not count:
        return frame, ()
    shown = frame.filter(taken).select([name for name in columns if name in frame.columns]).head(1)
    values = shown.rows()[0] if shown.width else ()
    example = ", ".join(f"{name}={value}" for name, value in zip(shown.columns, values, strict=True))
    return frame.filter(~taken), (Excluded(reason, count, example),)


def exclude_bad_rows(frame: pl.DataFrame, operation: str) -> tuple[pl.DataFrame, tuple[Excluded, ...]]:
    """Take out rows that no device could have given: no time or none that is one, shapes below one, nulls."""
    columns = (*KEY_COLUMNS, *SHAPE_COLUMNS[operation], "seconds")
    seconds = pl.col("seconds")
    return _in_turn(
        frame,
        columns,
        ((~(seconds.is_finite() & (seconds > 0)), BAD_SECONDS), (pl.any_horizontal(pl.all().is_null()), MISSING_VALUE),
         (_impossible_shape(operation), IMPOSSIBLE_SHAPE)),
    )  # fmt: skip


def _in_turn(
    frame: pl.DataFrame, columns: Sequence[str], rules: Sequence[tuple[pl.Expr, str]]
) -> tuple[pl.DataFrame, tuple[Excluded, ...]]:
    excluded: list[Excluded] = []
    for condition, reason in rules:
        frame, out = exclude(frame, condition, reason, columns)
        excluded.extend(out)
    return frame, tuple(excluded)


def _impossible_shape(operation: str) -> pl.Expr:
    shape = SHAPE_COLUMNS[operation]
    wrong = [pl.col(name) < (0 if name in MAY_BE_ZERO else 1) for name in shape]
    if "num_kv_heads" in shape:
        wrong.append(pl.col("num_heads") < pl.col("num_kv_heads"))
    if "prompt_tokens" in shape:
        wrong.append(pl.col("context_tokens") < pl.col("prompt_tokens"))
    return pl.any_horizontal(wrong)


def quarantine(timings: Timings, facts: DeviceFacts) -> Timings:
    """Take out rows that are known or shown to be wrong; what was excluded before stays counted.

    Raises
    ------
    CalibrationError
        The table's times are in another unit, all or some of them: no row of it can then be trusted.
    """
    if timings.frame.is_empty():
        return timings
    columns = (*KEY_COLUMNS, *SHAPE_COLUMNS[timings.operation], "seconds")
    frame, known = _in_turn(
        timings.frame, columns, [(fault.condition(timings.frame), fault.reason) for fault in KNOWN_FAULTS]
    )
    excluded = [*timings.excluded, *known]
    kept = []
    for _, rows in frame.group_by(KEY_COLUMNS, maintain_order=True):
        work = _work_of(rows, timings.operation, facts)
        ratio = _over_roofline(rows, work)
        check_units(rows, ratio)
        stays, out = _in_turn(_judged(rows, work, ratio, facts), columns, _PHYSICS)
        kept.append(stays.select(frame.columns))
        excluded.extend(out)
    whole = pl.concat(kept) if kept else frame
    return replace(timings, frame=whole, excluded=combine(excluded))


_PHYSICS = (
    (pl.col("_bandwidth"), ABOVE_BANDWIDTH),
    (pl.col("_flops"), ABOVE_FLOPS),
    (pl.col("_unit"), ANOTHER_UNIT),
)


def _work_of(rows: pl.DataFrame, operation: str, facts: DeviceFacts) -> LeastWork:
    shape = {name: rows[name].to_numpy().astype(np.float64) for name in SHAPE_COLUMNS[operation]}
    return least_work(operation, shape, {name: str(rows[name][0]) for name in KEY_COLUMNS}, facts)


def _over_roofline(rows: pl.DataFrame, work: LeastWork) -> FloatArray:
    """Seconds over roofline and launch; 1 where that says nothing of a kernel."""
    # A kernel of our own may be bound by neither rate; its rows name their unit.
    if rows["operation"][0] == "kernel" or work.moved_bytes is None or not work.bytes_per_s:
        return np.ones(len(rows))
    with np.errstate(over="ignore"):
        return np.asarray(rows["seconds"].to_numpy() / (work.seconds() + LAUNCH_S))


def check_units(rows: pl.DataFrame, ratio: FloatArray) -> None:
    """Raise CalibrationError where many rows of a key are far off the roofline."""
    outside = (ratio > SLOWEST) | (ratio < FASTEST)
    if outside.mean() <= WRONG_UNIT_SHARE:
        return
    key = " / ".join(str(rows[name][0]) for name in KEY_COLUMNS if rows[name][0])
    worst = rows.row(int(np.argmax(np.abs(np.log(ratio)))), named=True)
    shape = ", ".join(f"{name}={worst[name]}" for name in SHAPE_COLUMNS[str(worst["operation"])])
    msg = (
        f"{key}: {outside.mean():.0%} of {len(rows)} rows are over {SLOWEST:.0f} times slower or {1 / FASTEST:.0f} "
        f"times faster than the datasheet allows (such as {worst['seconds']:.3g} s for {shape}): the table mixes units "
        "or has another than it states; give seconds, or the tool's own unit"
    )
    raise CalibrationError(msg)


def _judged(rows: pl.DataFrame, work: LeastWork, ratio: FloatArray, facts: DeviceFacts) -> pl.DataFrame:
    seconds = rows["seconds"].to_numpy()
    # What may lie in cache says nothing about memory: only the arithmetic bounds it.
    cold = work.working_set_bytes > COLD_CACHES * facts.cache_bytes
    moved = np.zeros(len(seconds)) if work.moved_bytes is None else np.where(cold, work.moved_bytes, 0.0)
    bandwidth = work.bytes_per_s or np.inf
    with np.errstate(over="ignore"):
        above_bandwidth = moved > MARGIN * bandwidth * seconds
        above_flops = work.flops > MARGIN * work.flops_per_s * seconds
    return rows.with_columns(
        _bandwidth=pl.Series(above_bandwidth),
        _flops=pl.Series(above_flops),
        _unit=pl.Series((ratio > HOPELESS) | (ratio < FASTEST)),
    )


def exclude_small_keys(timings: Timings, min_rows: int) -> Timings:
    """Take out keys with fewer than `min_rows` rows: too few to fit and hold any out."""
    counted = timings.frame.with_columns(_rows=pl.len().over(KEY_COLUMNS))
    kept, out = exclude(counted, pl.col("_rows") < min_rows, TOO_FEW_ROWS, KEY_COLUMNS)
    return replace(timings, frame=kept.drop("_rows"), excluded=combine([*timings.excluded, *out]))


def combine(excluded: Sequence[Excluded]) -> tuple[Excluded, ...]:
    """Add up counts by reason, in the order of their first; the first example stands."""
    counts: dict[str, Excluded] = {}
    for one in excluded:
        seen = counts.get(one.reason)
        counts[one.reason] = one if seen is None else replace(seen, count=seen.count + one.count)
    return tuple(counts.values())
