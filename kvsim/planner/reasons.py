"""Why a point is what it is: which term decides against a baseline at equal settings, and what limits the device."""

from __future__ import annotations

from typing import Final

from kvsim.analysis import LoadShape
from kvsim.closed_form import total_seconds, variable_ticks
from kvsim.compression import Compression, parse_compression
from kvsim.errors import KvsimError
from kvsim.estimate import LoadPrices
from kvsim.ops import Component
from kvsim.planner.screen import Candidate, Screened, Screener
from kvsim.specs.base import Dtype, Spec
from kvsim.specs.device import DeviceSpec
from kvsim.units import TICKS_PER_SECOND

Parts = dict[str, float]
"""Seconds by part of a decode step."""

PARTS: Final = {
    Component.WEIGHTS: "weights",
    Component.ATTENTION: "decode streaming",
    Component.OVERHEAD: "launches",
    Component.COMMUNICATION: "links",
}
"""What a decode step's components are called; compression is told apart in two."""
UNPACKING: Final = "unpacking"
"""What a step takes longer for each token that it reads, because that is compressed."""
ENCODING: Final = "encoding"
"""What a step takes for compressing its new tokens and turning queries, launches among it, whatever the context."""
BATCH: Final = "sequences per step"
LIMITS: Final = {
    "weights": "streaming weights",
    "decode streaming": "streaming the KV cache",
    UNPACKING: "unpacking the KV cache",
    ENCODING: "encoding new tokens",
    "links": "links between devices",
    "launches": "kernel launches",
}
PROMPT_LIMITS: Final = {
    Component.WEIGHTS: "computing prompts",
    Component.ATTENTION: "attention over prompts",
    Component.COMPRESSION: "compressing prompts",
    Component.COMMUNICATION: "links between devices",
    Component.OVERHEAD: "kernel launches",
}
EVEN: Final = 0.01
"""Shares of a request's time below this decide nothing."""


class Term(Spec):
    """What one cause saves of a mean request's engine time against the baseline; less than 0 is a loss."""

    name: str
    saved_s: float


class Comparison(Spec):
    """A point beside a baseline at equal settings."""

    baseline: str
    request_s: float | None
    """Engine seconds of a mean request with the baseline; None where it cannot run."""
    own_request_s: float | None
    terms: tuple[Term, ...] = ()
    """They add up to the difference."""
    decides: str
    """The term that decides, in a sentence."""


def compare_with(point: Screened, name: str, screener: Screener) -> Comparison:
    """Hold a point against the baseline ``name`` with the same device, layout and settings."""
    baseline = point.candidate._replace(strategy=parse_compression(name))
    own = _request_seconds(screener.prices(point.candidate), point.batch, screener.load)
    if baseline.strategy == point.candidate.strategy:
        return Comparison(baseline=name, request_s=own, own_request_s=own, decides="it is the baseline")
    try:
        other = screener.screen(baseline)
    except KvsimError as error:
        return Comparison(
            baseline=name, request_s=None, own_request_s=own, decides=f"capacity: {name} cannot run here ({error})"
        )
    terms = _terms(screener.prices(baseline), other.batch, screener.prices(point.candidate), point.batch, screener.load)
    request_s = _request_seconds(screener.prices(baseline), other.batch, screener.load)
    fits = (other.sequences_that_fit, point.sequences_that_fit)
    sentence = _decides(terms, request_s, name, (other.batch, point.batch), fits)
    return Comparison(baseline=name, request_s=request_s, own_request_s=own, terms=terms, decides=sentence)


def _request_seconds(prices: LoadPrices, batch: float, load: LoadShape) -> float:
    """Engine time of a mean request: its prefill, and its share of each step that it decodes in."""
    return total_seconds(prices.prompt) + _share_of_step(prices, batch, load)


def _share_of_step(prices: LoadPrices, batch: float, load: LoadShape) -> float:
    steps = max(0, load.output_tokens - 1)
    return steps * prices.times(max(1.0, batch)) / max(1.0, batch)


def step_parts(prices: LoadPrices, batch: int, load: LoadShape) -> Parts:
    """Seconds of a decode step of a whole ``batch`` by part, with unpacking apart from encoding."""
    split, steps = prices.times.split(batch), max(0, load.output_tokens - 1)
    _, unpack_ticks = variable_ticks(prices.step, load.prompt_tokens, steps // 2)
    factor = prices.step.deployment.parallelism.lane_factor(batch)
    unpack_s = batch * factor * unpack_ticks / TICKS_PER_SECOND
    parts = {name: split[component] for component, name in PARTS.items()}
    return parts | {UNPACKING: unpack_s, ENCODING: split[Component.COMPRESSION] - unpack_s}


def _terms(base: LoadPrices, base_batch: float, own: LoadPrices, own_batch: float, load: LoadShape) -> tuple[Term, ...]:
    """First the format at the baseline's batch, component by component, then the batch: exact in sum."""
    steps, whole = max(0, load.output_tokens - 1), max(1, round(base_batch))
    before, after = step_parts(base, whole, load), step_parts(own, whole, load)
    terms = [Term(name="prefill", saved_s=total_seconds(base.prompt) - total_seconds(own.prompt))]
    terms += [
        Term(name=name, saved_s=steps * (before[name] - after[name]) / whole)
        for name in before
        if before[name] != after[name]
    ]
    # What rounding the batch to a whole one left out belongs to the batch.
    at_whole = (sum(before.values()) - sum(after.values())) * steps / whole
    rest = _share_of_step(base, base_batch, load) - _share_of_step(own, own_batch, load) - at_whole
    return (*terms, Term(name=BATCH, saved_s=rest))


def _decides(
    terms: tuple[Term, ...], request_s: float, name: str, batches: tuple[float, float], fits: tuple[float, float]
) -> str:
    largest = max(terms, key=lambda term: abs(term.saved_s))
    total = sum(term.saved_s for term in terms)
    if abs(largest.saved_s) < EVEN * request_s:
        return f"nothing decides: within {EVEN:.0%} of {name} in every term"
    change = f"{abs(total) / request_s:.0%} {'less' if total > 0 else 'more'} engine time per request than {name}"
    if abs(total) < EVEN * request_s:
        change = f"as much engine time per request as {name}"
    parts = [_spoken_term(term, request_s) for term in sorted(terms, key=lambda term: -abs(term.saved_s))]
    if largest.name == BATCH:
        is_capacity = fits[1] > fits[0] and batches[1] > batches[0]
        parts[0] = (
            f"{'capacity' if is_capacity else 'load'}: {batches[1]:.0f} sequences in a step, "
            f"{batches[0]:.0f} with {name}"
        )
        if is_capacity:
            parts[0] += f" ({fits[1]:.0f} fit instead of {fits[0]:.0f})"
    return "; ".join([change, *filter(None, parts)])


def _spoken_term(term: Term, request_s: float) -> str:
    """A term as a share of the baseline's request; nothing for one that decides nothing."""
    share = term.saved_s / request_s
    return f"{term.name} {'saves' if share > 0 else 'costs'} {abs(share):.0%}" if abs(share) >= EVEN else ""


def limit_of(point: Screened, device: DeviceSpec, screener: Screener) -> str:
    """What limits a point on its device: memory that caps the batch, or the largest part of its engine time."""
    prices, load = screener.prices(point.candidate), screener.load
    engine, layout = point.candidate.engine, point.candidate.layout
    name, share = _largest(prices, point.batch, load)
    text = f"{name} takes {share:.0%} of engine time"
    wanted = float(engine.max_num_seqs)
    if load.concurrency is not None:
        wanted = min(wanted, load.concurrency / layout.replicas)
    if point.sequences_that_fit < wanted and point.batch >= point.sequences_that_fit * (1 - EVEN):
        text = f"{device.memory_kind} capacity is the limit: {point.sequences_that_fit:.0f} sequences fit; {text}"
    elif point.utilization < 0.6:
        text = f"the load is the limit: the engine is busy {point.utilization:.0%}; {text}"
    return text


def _largest(prices: LoadPrices, batch: float, load: LoadShape) -> tuple[str, float]:
    whole, steps = max(1, round(batch)), max(0, load.output_tokens - 1)
    parts = {LIMITS[name]: steps * seconds / whole for name, seconds in step_parts(prices, whole, load).items()}
    for component, seconds in prices.prompt.items():
        name = PROMPT_LIMITS[component]
        parts[name] = parts.get(name, 0.0) + seconds
    name = max(parts, key=lambda key: parts[key])
    return name, parts[name] / sum(parts.values())


def device_facts(device: DeviceSpec, probes: dict[str, tuple[Parts, Parts]]) -> tuple[str, ...]:
    """What of the device decides between formats; ``probes``: strategy to the parts of (native's step, its own)."""
    facts = []
    if not device.supports(Dtype.FP8):
        units = ", ".join(device.native_dtypes.value)
        facts.append(f"no fp8 units (native: {units}), so 8-bit KV is turned to 16 bits before it is multiplied")
    return (*facts, *(_probe_fact(name, native, own) for name, (native, own) in probes.items()))


def _probe_fact(name: str, native: Parts, own: Parts) -> str:
    change = sum(native.values()) / sum(own.values()) - 1
    text = f"{name}: a decode step {'gains' if change >= 0 else 'loses'} {abs(change):.0%} on native at equal batch"
    reading = own["decode streaming"] + own[UNPACKING]
    if own[UNPACKING] > 0.5 * reading:
        return f"{text}, unpack-bound: {own[UNPACKING] / reading:.0%} of reading KV is unpacking it"
    if own[ENCODING] > max(own[UNPACKING], EVEN * sum(own.values())):
        return f"{text}; encoding new tokens takes {own[ENCODING] / sum(own.values()):.0%} of it"
    return text


def probe(
    screener: Screener, candidate: Candidate, strategies: tuple[str, ...], batch: int
) -> dict[str, tuple[Parts, Parts]]:
    """Decode steps of some strategies beside native's, at a candidate's settings and one batch; those that can run."""

    def parts(strategy: Compression) -> Parts:
        return step_parts(screener.prices(candidate._replace(strategy=strategy)), batch, screener.load)

    found: dict[str, tuple[Parts, Parts]] = {}
    for name in strategies:
        try:
            found[name] = (parts(Compression()), parts(parse_compression(name)))
        except KvsimError:
            continue
    return found
