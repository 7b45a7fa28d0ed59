"""Why a point is what it is: which term decides against a baseline at equal settings, and what limits the device."""

from __future__ import annotations

from typing import Final

from kvsim.analysis import LoadShape
from kvsim.closed_form import Split, total_seconds
from kvsim.compression import Compression, parse_compression
from kvsim.errors import KvsimError
from kvsim.estimate import LoadPrices
from kvsim.ops import Component
from kvsim.planner.screen import Candidate, Screened, Screener
from kvsim.specs.base import Dtype, Spec
from kvsim.specs.device import DeviceSpec

TERMS: Final = {
    Component.ATTENTION: "decode streaming",
    Component.COMPRESSION: "unpacking",
    Component.OVERHEAD: "launches",
    Component.COMMUNICATION: "links",
    Component.WEIGHTS: "weights",
}
"""What a change of a decode step's component at equal batch is called."""
BATCH: Final = "sequences per step"
LIMITS: Final = {
    Component.WEIGHTS: "streaming weights",
    Component.ATTENTION: "streaming the KV cache",
    Component.COMPRESSION: "unpacking the KV cache",
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


def _terms(base: LoadPrices, base_batch: float, own: LoadPrices, own_batch: float, load: LoadShape) -> tuple[Term, ...]:
    """First the format at the baseline's batch, component by component, then the batch: exact in sum."""
    steps, whole = max(0, load.output_tokens - 1), max(1, round(base_batch))
    before, after = base.times.split(whole), own.times.split(whole)
    terms = [Term(name="prefill", saved_s=total_seconds(base.prompt) - total_seconds(own.prompt))]
    terms += [
        Term(name=name, saved_s=steps * (before[component] - after[component]) / whole)
        for component, name in TERMS.items()
        if before[component] != after[component]
    ]
    # What rounding the batch to a whole one left out belongs to the batch.
    at_whole = (total_seconds(before) - total_seconds(after)) * steps / whole
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
    decode = {LIMITS[c]: steps * seconds / whole for c, seconds in prices.times.split(whole).items()}
    prompt = {_prompt_name(c): seconds for c, seconds in prices.prompt.items()}
    parts = decode | {name: decode.get(name, 0.0) + seconds for name, seconds in prompt.items()}
    name = max(parts, key=lambda key: parts[key])
    return name, parts[name] / sum(parts.values())


def _prompt_name(component: Component) -> str:
    names = {
        Component.WEIGHTS: "computing prompts",
        Component.ATTENTION: "attention over prompts",
        Component.COMPRESSION: "compressing prompts",
    }
    return names.get(component, LIMITS[component])


def device_facts(device: DeviceSpec, probes: dict[str, tuple[Split, Split]]) -> tuple[str, ...]:
    """What of the device decides between formats; ``probes``: strategy to a decode step (native's, its own)."""
    facts = []
    if not device.supports(Dtype.FP8):
        units = ", ".join(device.native_dtypes.value)
        facts.append(f"no fp8 units (native: {units}), so 8-bit KV is turned to 16 bits before it is multiplied")
    for name, (native, own) in probes.items():
        facts.append(_probe_fact(name, native, own))
    return tuple(facts)


def _probe_fact(name: str, native: Split, own: Split) -> str:
    gain = total_seconds(native) / total_seconds(own)
    reading = own[Component.ATTENTION] + own[Component.COMPRESSION]
    unpacking = own[Component.COMPRESSION] / reading if reading else 0.0
    text = f"{name}: a decode step {'gains' if gain >= 1 else 'loses'} {abs(gain - 1):.0%} on native at equal batch"
    return f"{text}, unpack-bound ({unpacking:.0%} of KV time is unpacking)" if unpacking > 0.5 else text


def probe(
    screener: Screener, candidate: Candidate, strategies: tuple[str, ...], batch: int
) -> dict[str, tuple[Split, Split]]:
    """Decode steps of some strategies beside native's, at a candidate's settings and one batch; those that can run."""
    found: dict[str, tuple[Split, Split]] = {}
    native = screener.prices(candidate._replace(strategy=Compression())).times.split(batch)
    for name in strategies:
        try:
            own = screener.prices(candidate._replace(strategy=parse_compression(name))).times.split(batch)
        except KvsimError:
            continue
        found[name] = (native, own)
    return found
