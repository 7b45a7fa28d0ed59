"""Measure on the GPU of this machine: is it the one named, and run the kernels package as a process of its own."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvsim.device_catalog import AMBIGUOUS_NAMES, load_device
from kvsim.errors import CalibrationError, InvalidSpec, UnknownName
from kvsim.spec_folder import normalize_name
from kvsim.specs.device import DeviceSpec

MEASURED: Final = "measured"
_CHECKOUT = Path(__file__).resolve().parents[2]
_PACKAGES: Final = ("kernels", "kvsim_kernels")
"""The kernels in a checkout, and in a wheel."""
_EXIT_FAILED_KERNELS: Final = 1
_EXIT_INTERRUPTED: Final = 130
_NAME_OF_GPU: Final = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"
_PROBE_TIMEOUT_S: Final = 120.0
OnLine = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes
    ----------
    out : Path
        Folder of the rows; those there already are kept and not taken again.
    operations : tuple of str
        Beginnings of variants' names; all where empty.
    budget_s : float or None
        Wall time to stop within.
    """

    out: Path
    operations: tuple[str, ...] = ()
    budget_s: float | None = None


def device_present(asked: str) -> DeviceSpec:
    """Give the device of this machine, if it is the one named.

    A name of several parts (``a100``) takes the one that is there.

    Raises
    ------
    UnknownName
        No device has the name asked for.
    CalibrationError
        There is no GPU, it is another than the one named, or one that kvsim does not know.
    """
    wanted = load_device(asked).spec
    driver_name = gpu_name()
    shown = asked if normalize_name(asked) == wanted.name else f"{asked!r} ({wanted.name})"
    if driver_name is None:
        msg = (
            f"--gpu {shown}: this machine has no GPU that torch or nvidia-smi sees; run kvsim calibrate on one that "
            "has, or fit from existing tables with --from PATH"
        )
        raise CalibrationError(msg)
    if normalize_name(driver_name) in {normalize_name(alias) for alias in wanted.aliases}:
        return wanted
    try:
        present = load_device(driver_name).spec
    except UnknownName:
        msg = (
            f"--gpu {shown}: this machine has {driver_name!r}, which no device answers to; write a device YAML file "
            "with that name among its aliases and give its path"
        )
        raise CalibrationError(msg) from None
    ambiguity = AMBIGUOUS_NAMES.get(normalize_name(asked))
    if present.name not in {wanted.name, *(ambiguity.others if ambiguity else ())}:
        msg = f"--gpu {shown}: this machine has {driver_name!r} ({present.name}); give --gpu {present.name}"
        raise CalibrationError(msg)
    return present


def gpu_name() -> str | None:
    """Name of the first GPU as its driver says, None where there is none.

    torch is asked in a process of its own, so that this one never holds a GPU.
    """
    if importlib.util.find_spec("torch") is not None:
        name = _output_of([sys.executable, "-c", _NAME_OF_GPU])
        if name:
            return name
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    return _output_of([smi, "--query-gpu=name", "--format=csv,noheader"])


def measure(request: Request, on_line: OnLine) -> str | None:
    """Run the measuring package until it is done or out of budget.

    Returns
    -------
    str or None
        What went wrong with single kernels, where something did; the rows of the others are good.

    Raises
    ------
    CalibrationError
        It cannot run, or ended without rows to trust.
    """
    arguments = ["--out", str(request.out.absolute())]
    if request.budget_s is not None:
        arguments += ["--budget", f"{request.budget_s:g}"]
    status, last = _run([*arguments, *_operations(request.operations)], on_line)
    if status == _EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if status not in (0, _EXIT_FAILED_KERNELS):
        msg = f"measuring ended with status {status}: {last or 'no message'}"
        raise CalibrationError(msg)
    return "some kernels failed and were not timed; see correctness.csv and rejected.csv" if status else None


def print_plan(spec: DeviceSpec, operations: Sequence[str], on_line: OnLine) -> None:
    """Have the measuring package say what it would time on a device; needs torch and triton, but no GPU.

    Raises
    ------
    CalibrationError
        It cannot run.
    """
    target = ["--target", spec.compile_target] if spec.compile_target else []
    status, last = _run(["--dry-run", *target, *_operations(operations)], on_line)
    if status not in (0, _EXIT_FAILED_KERNELS):
        msg = f"the plan ended with status {status}: {last or 'no message'}"
        raise CalibrationError(msg)


def _operations(operations: Sequence[str]) -> list[str]:
    return ["--ops", *operations] if operations else []


def _run(arguments: Sequence[str], on_line: OnLine) -> tuple[int, str]:
    """Run the package and hand on each line; give its status and the last line."""
    command = [sys.executable, "-m", f"{_package()}.measure", *arguments]
    last = ""
    # Errors go where the lines go, so that the last line says why.
    with subprocess.Popen(  # noqa: S603 - our own package, no shell
        command, cwd=_CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        for line in child.stdout or ():
            last = line.rstrip() or last
            on_line(line.rstrip())
        return child.wait(), last


def _package() -> str:
    """Name of the kernels package.

    Raises
    ------
    InvalidSpec
        torch or triton is missing.
    CalibrationError
        This installation has no measuring package.
    """
    for library in ("torch", "triton"):
        if importlib.util.find_spec(library) is None:
            msg = f"measuring needs {library}: pip install 'kvsim[kernels]'; tables can be fitted without, with --from"
            raise InvalidSpec(msg)
    for package in _PACKAGES:
        if (_CHECKOUT / package / "measure" / "__main__.py").is_file():
            return package
    msg = f"{_CHECKOUT}: holds no kernels to measure; fit from existing tables with --from PATH"
    raise CalibrationError(msg)


def _output_of(command: Sequence[str]) -> str | None:
    """First line that a command prints, None where it fails or prints nothing."""
    try:
        done = subprocess.run(  # noqa: S603 - fixed arguments, no shell
            command, capture_output=True, text=True, check=True, timeout=_PROBE_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if lines else None
