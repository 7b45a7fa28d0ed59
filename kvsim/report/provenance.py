"""What made a report, and what is known of quality."""

from __future__ import annotations

from typing import Literal

from kvsim.specs.base import Basis, Spec

TaskClass = Literal[
    "language modelling",
    "knowledge",
    "short reasoning",
    "reasoning",
    "code",
    "long-context retrieval",
    "long-context understanding",
    "unstated",
]
"""What a benchmark asks for. ``reasoning`` is a long chain of generated thought (AIME, GPQA, LiveCodeBench, MATH), in
which errors add up; ``short reasoning`` is GSM8K and the like. No class's score stands for another's."""


class QualityNote(Spec):
    """One published score, or one between two of them on the same curve."""

    task: str
    metric: str
    value: float
    baseline: float | None
    """The same with uncompressed KV; None where the source does not state it."""
    model: str
    source: str
    task_class: TaskClass = "unstated"
    direction: Literal["higher", "lower"] = "higher"
    """Which is better."""
    bound: Literal["at most", "at least"] | None = None
    """Where the source states a bound and no value."""
    query: Literal["aware", "agnostic"] | None = None
    """Whether the question was visible when tokens were chosen; None where none are."""
    reasoning: bool = False
    """Whether the model thinks at length before it answers."""
    setting: str = ""
    """Budget, context, and how the source differs from the strategy."""
    evidence: Literal["primary", "secondary", "recalled", "digitised"] = "primary"
    """Read in the paper or project itself, in a text about it, from memory, or off a figure of the primary text."""
    interpolated_between: tuple[str, str] | None = None
    """The strategies on both sides, where the score was read between theirs."""

    @property
    def setting_line(self) -> str:
        """Whether the question was visible, whether the model thinks at length, budget and deviations."""
        parts = [f"query-{self.query}"] if self.query else []
        parts += ["thinking"] if self.reasoning else []
        return ", ".join([*parts, self.setting] if self.setting else parts)

    @property
    def evidence_line(self) -> str:
        """How the score was come by."""
        if self.interpolated_between is None:
            return self.evidence
        below, above = self.interpolated_between
        return f"{self.evidence}, interpolated between {below} and {above}"

    @property
    def line(self) -> str:
        """All of it in one line, for a cell of a result file."""
        sign = f"{self.bound} " if self.bound else ""
        native = "unknown" if self.baseline is None else f"{self.baseline:g}"
        marks = ", ".join(filter(None, (self.task_class, self.model, self.setting_line, self.evidence_line)))
        return f"{self.task} {self.metric} {sign}{self.value:.5g} against {native} [{marks}]"


class Quality(Spec):
    """What is known of the quality risk; unknown is said, never shown as zero."""

    status: Literal["unknown", "baseline", "published", "interpolated"] = "unknown"
    """``interpolated`` where every score lies between two published ones."""
    notes: tuple[QualityNote, ...] = ()
    warnings: tuple[str, ...] = ()
    """What the scores do not cover."""

    @property
    def task_classes(self) -> str | None:
        """Classes with a score, with semicolons between them; None where there is none."""
        return "; ".join(sorted({note.task_class for note in self.notes})) or None

    @property
    def scores(self) -> str | None:
        """Every score with its marks in one line; None where there is none."""
        return "; ".join(note.line for note in self.notes) or None


class KernelUsed(Spec):
    """A fitted kernel that priced an operation."""

    operation: str
    kernel: str
    version: str
    artefact: str
    """Hash that names it in the calibration set."""
    basis: Basis


class Provenance(Spec):
    """What made this report."""

    kvsim_version: str
    scenario_sha256: str
    calibration: str
    """Which set priced the operations; the priors' name where none did."""
    device: str
    model: str
    model_source: str
    workload_source: str
    kernels: tuple[KernelUsed, ...] = ()
    """Fitted kernels that priced operations; priors priced the rest."""
    notes: tuple[str, ...] = ()
    """What a reader must know: aliases resolved, features switched off and why, assumptions."""
