"""What one person's device holds, how fast it answers, and how long its battery lasts: one sequence, closed forms.

The longest context is the least of three: what memory holds while the prompt is read, what can still be decoded at a
reading speed, and what the model was made for. Rates are those that heat leaves, where a source says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from kvsim.analysis import price_edges
from kvsim.catalog import resolve
from kvsim.closed_form import decode_split, prefill_split, total_seconds
from kvsim.compression import parse_compression
from kvsim.cost.priors import EDGES, Edge, device_class
from kvsim.cost.step import StepModel
from kvsim.deployment import Deployment
from kvsim.errors import InvalidSpec, KvsimError
from kvsim.memory import plan_memory, plan_or, slot_tokens
from kvsim.pool import block_bytes, longest_sequence
from kvsim.report import Figure
from kvsim.scenario import Scenario
from kvsim.specs.base import Basis, Spec

READING_TOKENS_PER_S: Final = 5.3
"""Silent reading at 238 words a minute (Brysbaert 2019) of 0.75 words a token (OpenAI's rule of thumb)."""
UNLIMITED_TOKENS: Final = 2**27

Limit = Literal["memory", "reading speed", "model"]


@dataclass(frozen=True)
class EdgeQuestion:
    """What a person wants of the device; what is None comes from the device's spec."""

    reading_tokens_per_s: float = READING_TOKENS_PER_S
    context_tokens: int | None = None
    """Context that rates and energy are given at; the longest one if None."""
    battery_j: float | None = None
    power_w: float | None = None


class EdgeAnswer(Spec):
    """One strategy on one device, one sequence at a time. A field is None where it is unknown or did not run."""

    strategy: str
    device: str
    reason: str | None = None
    """Why it cannot run."""
    model_tokens: int | None = None
    memory_tokens: Figure | None = None
    """Longest prompt that memory holds; compression that acts after the prompt does not lengthen it. Value None where
    what is held is bounded, so that memory ends no prompt."""
    readable_tokens: Figure | None = None
    """Longest context that is decoded at the reading speed, at most the model's; 0 where none is."""
    context_tokens: Figure | None = None
    limit: Limit | None = None
    """What ends the context, at the central estimate."""
    rated_tokens: int | None = None
    """Context of everything below: the longest, at the central estimate, unless another was asked for."""
    prefill_s: Figure | None = None
    """Time to read a prompt of that length, cold."""
    decode_tokens_per_s: Figure | None = None
    """Behind that context, cold."""
    sustained_tokens_per_s: Figure | None = None
    """The same after minutes; value None where no source says what heat leaves."""
    power_w: Figure | None = None
    joules_per_token: Figure | None = None
    battery_s: Figure | None = None
    """Decoding from a full battery, all else switched off."""
    battery_tokens: Figure | None = None
    notes: tuple[str, ...] = ()


def edge_answers(
    scenario: Scenario,
    strategies: Iterable[str],
    question: EdgeQuestion = EdgeQuestion(),
    *,
    base_dir: Path | None = None,
) -> tuple[EdgeAnswer, ...]:
    """Answer for each strategy; one that cannot run keeps a row with the reason.

    Raises
    ------
    InvalidSpec
        A reading speed, battery or power that is not positive; or the scenario is wrong.
    UnknownName
        A strategy or another name is unknown.
    """
    for name in ("reading_tokens_per_s", "context_tokens", "battery_j", "power_w"):
        value = getattr(question, name)
        if value is not None and not value > 0:
            msg = f"{name} must be positive, got {value!r}"
            raise InvalidSpec(msg)
    named = [(name, parse_compression(name)) for name in strategies]
    answers = []
    for name, compression in named:
        one = scenario.model_copy(update={"compression": compression, "adaptive": None})
        try:
            answers.append(_answer(name, resolve(one, base_dir=base_dir), question))
        except KvsimError as error:
            if error.exit_code not in (2, 3):
                raise
            answers.append(EdgeAnswer(strategy=name, device=scenario.device, reason=str(error)))
    return tuple(answers)


def _answer(name: str, deployment: Deployment, question: EdgeQuestion) -> EdgeAnswer:
    one = _OnDevice(deployment, question)
    longest = one.context_tokens(Edge.CENTRAL)
    rated = question.context_tokens or longest
    power, energy = one.power(), one.joules_per_token(rated)
    battery_j = question.battery_j or (deployment.device.battery.value if deployment.device.battery else None)
    unbounded = one.memory_tokens(Edge.CENTRAL) == UNLIMITED_TOKENS
    return EdgeAnswer(
        strategy=name,
        device=deployment.device.name,
        model_tokens=one.model_tokens,
        memory_tokens=Figure(value=None) if unbounded else one.over_edges(one.memory_tokens),
        readable_tokens=one.over_edges(one.readable_tokens),
        context_tokens=one.over_edges(one.context_tokens),
        limit=one.limit(),
        rated_tokens=rated,
        prefill_s=one.over_edges(lambda edge: one.prefill_s(edge, rated)),
        decode_tokens_per_s=one.over_edges(lambda edge: one.rate(edge, rated)),
        sustained_tokens_per_s=one.over_edges(lambda edge: one.sustained(edge, rated)),
        power_w=power,
        joules_per_token=energy,
        battery_s=_divided(battery_j, power),
        battery_tokens=_divided(battery_j, energy),
        notes=(*deployment.notes, *one.notes()),
    )


class _OnDevice:
    """One deployment's closed forms at every edge of the priors."""

    def __init__(self, deployment: Deployment, question: EdgeQuestion) -> None:
        self.deployment, self.question = deployment, question
        self.models: Mapping[Edge, StepModel] = price_edges(deployment, EDGES).mine
        self.plan = plan_memory(deployment, block_bytes(deployment))
        self.model_tokens = deployment.engine.max_model_len or deployment.model.max_position_embeddings
        self._readable: dict[Edge, int] = {}

    def over_edges(self, read: Callable[[Edge], float | None]) -> Figure:
        """Central value and band; priors are in all of them, so the basis is the literature."""
        values = {edge: read(edge) for edge in self.models}
        known = [value for value in values.values() if value is not None]
        if values[Edge.CENTRAL] is None:
            return Figure(value=None)
        return Figure(value=values[Edge.CENTRAL], low=min(known), high=max(known), basis=Basis.LITERATURE)

    def memory_tokens(self, edge: Edge) -> int:
        plan = plan_or(self.plan, self.deployment, edge)
        most = slot_tokens(self.deployment) or UNLIMITED_TOKENS
        return longest_sequence(self.deployment, plan.num_blocks * plan.block_bytes, most)

    def rate(self, edge: Edge, context: int) -> float | None:
        """Tokens per second of one sequence behind ``context`` tokens, cold; None where there is no context."""
        if not context:
            return None
        return 1.0 / total_seconds(decode_split(self.models[edge], 1, context, 0))

    def sustained(self, edge: Edge, context: int) -> float | None:
        kept, cold = self.deployment.device.sustained_decode, self.rate(edge, context)
        if kept is None or cold is None:
            return None
        return cold * kept.efficiency(edge)

    def prefill_s(self, edge: Edge, context: int) -> float | None:
        return total_seconds(prefill_split(self.models[edge], context)) if context else None

    def readable_tokens(self, edge: Edge) -> int:
        """Longest context that is decoded at the reading speed, by what heat leaves where that is known."""
        if edge not in self._readable:
            self._readable[edge] = self._bisect(edge)
        return self._readable[edge]

    def _bisect(self, edge: Edge) -> int:
        low, high = 0, self.model_tokens
        while low < high:
            middle = (low + high + 1) // 2
            rate = self.sustained(edge, middle) or self.rate(edge, middle) or 0.0
            low, high = (middle, high) if rate >= self.question.reading_tokens_per_s else (low, middle - 1)
        return low

    def context_tokens(self, edge: Edge) -> int:
        return min(self.memory_tokens(edge), self.readable_tokens(edge), self.model_tokens)

    def limit(self) -> Limit:
        memory, readable = self.memory_tokens(Edge.CENTRAL), self.readable_tokens(Edge.CENTRAL)
        if min(memory, readable) >= self.model_tokens:
            return "model"
        return "memory" if memory <= readable else "reading speed"

    def power(self) -> Figure:
        """Power while decoding, in watts: given, measured by a source, what heat allows, or a share of the TDP."""
        device = self.deployment.device
        if self.question.power_w is not None:
            return Figure(value=self.question.power_w)
        if device.decode_power is not None:
            return Figure(value=device.decode_power.value, basis=Basis.LITERATURE)
        shed = self.deployment.priors.sustained_power_w.get(device_class(device))
        if shed is not None:
            return Figure(value=shed.value, low=shed.low, high=shed.high, basis=Basis.LITERATURE)
        if device.tdp is None:
            return Figure(value=None)
        share, tdp_w = self.deployment.priors.power_fraction["decode"], device.tdp.value
        return Figure(value=tdp_w * share.value, low=tdp_w * share.low, high=tdp_w * share.high, basis=Basis.LITERATURE)

    def joules_per_token(self, context: int) -> Figure:
        """Energy of a token behind ``context``; unknown where power is what heat allows and the rate is not."""
        heat_limited = self.question.power_w is None and device_class(self.deployment.device) == "mobile"
        read = self.sustained if heat_limited else self._lasting
        rates = self.over_edges(lambda edge: read(edge, context))
        power = self.power()
        if power.value is None or not rates.value:
            return Figure(value=None)
        low_w, high_w = power.low or power.value, power.high or power.value
        return Figure(
            value=power.value / rates.value,
            low=low_w / (rates.high or rates.value),
            high=high_w / (rates.low or rates.value),
            basis=Basis.LITERATURE,
        )

    def _lasting(self, edge: Edge, context: int) -> float | None:
        return self.sustained(edge, context) or self.rate(edge, context)

    def notes(self) -> tuple[str, ...]:
        device, found = self.deployment.device, []
        if device.sustained_decode is None and device.kind in ("mobile", "edge"):
            found.append(f"no source says what heat leaves of {device.name}'s decode rate: contexts are judged cold")
        if self.question.battery_j is None and device.battery is None:
            found.append("battery life is unknown: --battery gives the capacity, such as 53.8 Wh")
        if self.power().value is not None and self.question.power_w is None:
            found.append("power is that of the chip at decode; screen and radio come on top (--power gives the whole)")
        return tuple(found)


def _divided(battery_j: float | None, per_unit: Figure) -> Figure:
    """What a battery lasts for: seconds at a power, tokens at an energy each."""
    if battery_j is None or per_unit.value is None:
        return Figure(value=None)
    low, high = per_unit.low or per_unit.value, per_unit.high or per_unit.value
    return Figure(value=battery_j / per_unit.value, low=battery_j / high, high=battery_j / low, basis=per_unit.basis)
