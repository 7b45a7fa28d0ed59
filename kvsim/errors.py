"""Every error kvsim raises, sorted by who can act on it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KvsimError(Exception):
    """Root of all errors that a user can act on; ``exit_code`` is the CLI's status."""

    exit_code = 2

    def locate(self, where: str) -> None:
        """Put the file or field that is at fault before the message, once."""
        if not str(self).startswith(f"{where}:"):
            self.args = (f"{where}: {self}",)


class ScenarioError(KvsimError):
    """The input is wrong and the user can fix it."""


class UnknownName(ScenarioError):
    """A name that no catalogue entry, alias or option carries."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, where: str | None = None) -> None:
        known_names = sorted(set(known))
        near = difflib.get_close_matches(name.lower(), known_names, n=3, cutoff=0.5)
        if near:
            hint = "did you mean " + " or ".join(repr(n) for n in near) + "?"
        else:
            hint = "known: " + ", ".join(known_names[:12]) + (", …" if len(known_names) > 12 else "")
        prefix = f"{where}: " if where else ""
        super().__init__(f"{prefix}unknown {kind} {name!r}; {hint}")
        self.kind = kind
        self.name = name
        self.suggestions = near


class InvalidSpec(ScenarioError):
    """A value that its field does not allow, named with file, field, value and what is allowed."""


class IncompatibleScenario(ScenarioError):
    """A pair of choices that cannot go together (strategy and model, strategy and device), with the reason."""


class NotRunnable(ScenarioError):
    """A method whose algorithm cannot run on KV tensors, with the reason (it must be trained into the model)."""

    def __init__(self, method: str, reason: str = "its algorithm does not run on tensors here") -> None:
        super().__init__(f"{method}: {reason}")
        self.method = method
        self.reason = reason


class TraceError(ScenarioError):
    """A trace file that cannot be read as the format named."""


class InfeasibleScenario(KvsimError):
    """A valid question whose answer is no: it does not fit, or the SLO is missed."""

    exit_code = 3


class WeightsDoNotFit(InfeasibleScenario):
    """The weights and the engine's own memory leave no room for KV cache."""


class RequestDoesNotFit(InfeasibleScenario):
    """The longest request needs more KV cache than the pool holds."""


class SloMissed(InfeasibleScenario):
    """The scenario ran and misses the service-level objectives that it names."""


class LogMismatch(KvsimError):
    """A server's log and the prediction for it differ by more than the tolerance."""

    exit_code = 3


class Cancelled(KvsimError):
    """Work that its caller stopped before it was done."""


class CalibrationError(KvsimError):
    """Someone must measure first, or a calibration file is not to be trusted."""

    exit_code = 4


class InvariantViolation(Exception):
    """A bug in kvsim. Never caught, so it keeps its traceback; a sweep keeps it as a row and ends with status 1."""
