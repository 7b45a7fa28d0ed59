"""From tables to a set that a scenario can name: plan, fit, and write all or nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvsim.calibration.artefact import Artefact
from kvsim.calibration.build import fit_artefacts
from kvsim.calibration.choice import default_ids, version_order
from kvsim.calibration.fit import MIN_ROWS
from kvsim.calibration.kv_formats import is_known
from kvsim.calibration.laws import LAWS
from kvsim.calibration.sets import FITTED, SETS, CalibrationSet, Key, Pin, load_set, named, pins_of, set_text
from kvsim.calibration.sources.frames import merge
from kvsim.calibration.staleness import OWN_KERNELS
from kvsim.calibration.timings import KEY_COLUMNS, Excluded, Timings
from kvsim.device_catalog import load_device
from kvsim.documents import write_output
from kvsim.errors import CalibrationError, InvalidSpec, UnknownName

NO_LAW = "no law for this operation yet"
UNKNOWN_FORMAT = "KV format whose bytes are not known"
TOO_FEW = f"fewer than {MIN_ROWS} rows"
OLDER = "older version of the same kernel"
SHIPPED = "default"
OnProgress = Callable[[float, str], None]
"""Takes the share done and what comes next."""


@dataclass(frozen=True)
class FitPlan:
    """What would be fitted: rows by key, and what is left out by reason."""

    parts: tuple[Timings, ...]
    """One key each, with rows enough."""
    excluded: tuple[Excluded, ...]

    @property
    def keys(self) -> tuple[tuple[Key, int], ...]:
        """Values of KEY_COLUMNS and number of rows of each fit."""
        return tuple((_key(part), len(part.frame)) for part in self.parts)

    @property
    def excluded_by_reason(self) -> dict[str, int]:
        """Rows left out, by reason."""
        counts: Counter[str] = Counter()
        for one in self.excluded:
            counts[one.reason] += one.count
        return dict(sorted(counts.items()))


def plan_fits(timings: Iterable[Timings]) -> FitPlan:
    """Split tables by key; keys that cannot be fitted are left out by name."""
    parts: list[Timings] = []
    excluded: list[Excluded] = []
    # The same kernel may stand in several folders: its rows are fitted together.
    for one in merge(list(timings)):
        excluded += one.excluded
        for _, rows in one.frame.group_by(KEY_COLUMNS, maintain_order=True):
            part = replace(one, frame=rows)
            if one.operation not in LAWS:
                excluded.append(Excluded(NO_LAW, len(rows), one.operation))
            elif one.operation != "kernel" and not is_known(_key(part)[5]):
                excluded.append(Excluded(UNKNOWN_FORMAT, len(rows), named(_key(part))))
            elif len(rows) < MIN_ROWS:
                excluded.append(Excluded(TOO_FEW, len(rows), named(_key(part))))
            else:
                parts.append(part)
    newest = _newest(parts)
    kept = {_key(part) for part in newest}
    excluded += [Excluded(OLDER, len(part.frame), named(_key(part))) for part in parts if _key(part) not in kept]
    return FitPlan(tuple(newest), tuple(excluded))


def _newest(parts: Iterable[Timings]) -> list[Timings]:
    """Keep one version of each kernel, in the order of keys."""
    found: dict[tuple[str, ...], Timings] = {}
    for part in sorted(parts, key=lambda part: version_order(_key(part)[3])):
        device, operation, kernel, _, dtype, kv_dtype = _key(part)
        found[device, operation, kernel, dtype, kv_dtype] = part
    return [found[key] for key in sorted(found)]


def require_rows(plan: FitPlan, where: str) -> None:
    """Refuse tables of which nothing can be fitted.

    Raises
    ------
    CalibrationError
        With what was left out, by reason.
    """
    if plan.parts:
        return
    reasons = ", ".join(f"{reason}: {count}" for reason, count in plan.excluded_by_reason.items())
    msg = f"{where}: nothing to fit" + (f" (rows left out: {reasons})" if reasons else "; no rows of that device")
    raise CalibrationError(msg)


def fit_plan(plan: FitPlan, on_progress: OnProgress | None = None) -> list[Artefact]:
    """Fit every key of a plan."""
    artefacts: list[Artefact] = []
    for position, part in enumerate(plan.parts):
        key = _key(part)
        if on_progress is not None:
            on_progress(position / len(plan.parts), named(key))
        fitted, _ = fit_artefacts(part, load_device(key[0]).spec)
        artefacts += fitted
    return artefacts


@dataclass(frozen=True)
class Written:
    """What a calibration left on disk."""

    set_path: Path
    artefact_paths: tuple[Path, ...]
    pins: tuple[Pin, ...]


def write_set(artefacts: Sequence[Artefact], out: Path, name: str, *, may_replace: bool = False) -> Written:
    """Write artefacts to ``out/fitted/<device>`` and a set that pins them to ``out/sets/<name>.yaml``, the set last.

    The set also pins what the shipped set has for the same devices and the new artefacts do not replace, with copies of
    those artefacts beside it, so that a later kvsim cannot change it. Files that are there already are not touched.

    Raises
    ------
    CalibrationError
        A set of that name pins something else and may not be replaced.
    InvalidSpec
        The system refuses to write.
    """
    together, defaults = _with_shipped(artefacts)
    pins = pins_of(together, defaults)
    set_path = set_file(out, name)
    text = set_text(name, pins)
    if set_path.is_file() and set_path.read_text(encoding="utf-8") != text and not may_replace:
        msg = f"{set_path}: pins other artefacts; give another name with --set, or --replace it"
        raise CalibrationError(msg)
    try:
        paths = tuple(one.save(out / FITTED) for one in together)
    except OSError as error:
        msg = f"{out}: cannot write: {error.strerror}"
        raise InvalidSpec(msg) from error
    write_output(set_path, text.encode())
    return Written(set_path, paths, pins)


def set_file(out: Path, name: str) -> Path:
    """Place of a set; raise InvalidSpec for a name that is none."""
    if not name or not all(letter.isalnum() or letter in "-_." for letter in name) or name.startswith("."):
        msg = f"--set: {name!r} is not allowed; allowed: letters, digits, - _ ."
        raise InvalidSpec(msg)
    return out / SETS / f"{name}.yaml"


def check_out(out: Path) -> None:
    """Refuse before the work a folder that cannot be written to after it."""
    blocking = next((place for place in (out, *out.parents) if place.exists() and not place.is_dir()), None)
    if blocking is not None:
        msg = f"--out: {blocking} is a file, not a folder"
        raise InvalidSpec(msg)


def _with_shipped(fresh: Sequence[Artefact]) -> tuple[list[Artefact], frozenset[str]]:
    """Add what the shipped set has for the same devices, and choose what ``auto`` takes.

    What was fitted now goes before what is shipped, except kvsim's own kernels, which give way to a production kernel.
    """
    replaced = {_kernel_of(one) for one in fresh}
    shipped = _shipped_set()
    devices = {one.device for one in fresh}
    pins = [pin for pin in shipped.pins if pin.device in devices] if shipped is not None else []
    old = [one for one in (shipped.load(pin) for pin in pins) if _kernel_of(one) not in replaced] if shipped else []
    production = [one for one in fresh if not one.kernel.startswith(OWN_KERNELS)]
    decided = {_choice_of(one) for one in production}
    rest = [one for one in (*fresh, *old) if _choice_of(one) not in decided]
    return [*fresh, *old], default_ids(production) | default_ids(rest)


def _shipped_set() -> CalibrationSet | None:
    try:
        return load_set(SHIPPED)
    except UnknownName:
        return None


def _kernel_of(one: Artefact) -> tuple[str, ...]:
    return (one.device, one.operation, one.kernel, one.dtype, one.kv_dtype)


def _choice_of(one: Artefact) -> tuple[str, ...]:
    return (one.device, one.operation, one.dtype, one.kv_dtype)


def _key(part: Timings) -> Key:
    first = part.frame.row(0, named=True)
    return (*(str(first[name]) for name in KEY_COLUMNS),)  # type: ignore[return-value]
