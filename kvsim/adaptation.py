"""From what adapting left behind to the report: levels, classes, acts, and this policy beside each level held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvsim.adaptive import Adaptive
from kvsim.cost.layer_bytes import layer_bytes_per_token
from kvsim.deployment import Deployment
from kvsim.report import AdaptiveAction, AdaptiveUse, ClassUse, Figure, LevelUse, PolicyOutcome
from kvsim.requests import RequestTable
from kvsim.sim.adaptive.record import Action, AdaptiveRecord
from kvsim.sim.run import RunResult
from kvsim.specs.base import Basis
from kvsim.statistics import of_samples
from kvsim.summary import Outcome
from kvsim.units import TICKS_PER_SECOND

MAX_ACTIONS = 100
"""Acts that a report lists; all are counted."""


def adaptive_use(
    result: RunResult,
    deployment: Deployment,
    requests: RequestTable,
    outcomes: Sequence[PolicyOutcome],
    basis: Basis,
) -> AdaptiveUse | None:
    """What the policy of an adaptive deployment did; None where nothing adapts."""
    records = [record.adaptive for record in result.records if record.adaptive is not None]
    if deployment.adaptive is None:
        return None
    acts = sorted(_actions(records), key=lambda act: (act[0].at_ticks, act[1]))
    encoded = [action for action, _ in acts if action.sequences]
    return AdaptiveUse(
        levels=tuple(_levels(records, deployment, deployment.adaptive, result.end_ticks)),
        classes=tuple(_classes(records, result, requests, basis)),
        actions=tuple(_shown(action, replica, result.pool_bytes) for action, replica in acts[:MAX_ACTIONS]),
        total_actions=len(acts),
        tightened=sum(action.to_level > action.from_level for action, _ in acts),
        relaxed=sum(action.to_level < action.from_level for action, _ in acts),
        requantized_sequences=sum(action.sequences for action in encoded),
        requantized_tokens=sum(record.requantized_tokens for record in records),
        requantize_freed_bytes=sum(action.freed_bytes for action in encoded),
        requantize_s=sum(record.requantize_ticks for record in records) / TICKS_PER_SECOND,
        reduced_share=reduced_share(result),
        outcomes=tuple(outcomes),
    )


def policy_outcome(
    policy: str, compression: str, result: RunResult, one: Outcome, basis: Basis, reduced: Figure
) -> PolicyOutcome:
    """One policy's numbers at the central edge."""

    def figure(value: float | None) -> Figure:
        return Figure(value=value, basis=basis if value is not None else None)

    seconds = one.duration_s
    return PolicyOutcome(
        policy=policy,
        compression=compression,
        duration_s=figure(seconds),
        queue_delay_mean_s=figure(one.queue_delay_mean_s),
        ttft_p99_s=figure(one.ttft.p99_s),
        tpot_median_s=figure(one.tpot.median_s),
        e2el_p99_s=figure(one.e2el.p99_s),
        output_throughput=figure(one.output_tokens / seconds if seconds else None),
        request_goodput=figure(one.good / seconds if one.good is not None and seconds else None),
        preemptions=sum(record.preemptions for record in result.records),
        reduced_share=reduced,
    )


def reduced_share(result: RunResult) -> Figure:
    """Share of decoded tokens at a level after the first, over all replicas and classes."""
    records = [record.adaptive for record in result.records if record.adaptive is not None]
    return _share([sum(column) for column in zip(*(row for record in records for row in record.tokens), strict=True)])


def _share(tokens: Sequence[int]) -> Figure:
    total = sum(tokens)
    return Figure(value=sum(tokens[1:]) / total if total else None)


def _actions(records: Sequence[AdaptiveRecord]) -> Iterator[tuple[Action, int]]:
    for replica, record in enumerate(records):
        yield from ((action, replica) for action in record.actions)


def _shown(action: Action, replica: int, pool_bytes: int) -> AdaptiveAction:
    return AdaptiveAction(
        time_s=action.at_ticks / TICKS_PER_SECOND,
        replica=replica,
        from_level=action.from_level,
        to_level=action.to_level,
        reason=action.reason,
        kv_utilization=action.used_bytes / pool_bytes,
        waiting=action.waiting,
        requantized_sequences=action.sequences,
        freed_bytes=action.freed_bytes,
    )


def _levels(
    records: Sequence[AdaptiveRecord], deployment: Deployment, adaptive: Adaptive, end_ticks: int
) -> Iterator[LevelUse]:
    spent = [record.level_ticks(end_ticks) for record in records]
    for level, (chosen, variant) in enumerate(zip(adaptive.levels, deployment.levels, strict=True)):
        per_token = sum(
            layers * layer_bytes_per_token(layer_class, view, variant.model)
            for layer_class in variant.layer_classes
            for view, layers in layer_class.bands
        )
        yield LevelUse(
            level=level,
            compression=chosen.name,
            kv_bytes_per_token=per_token * variant.tensor_parallel_size,
            prompts=sum(record.prompts[level] for record in records),
            tokens_decoded=sum(row[level] for record in records for row in record.tokens),
            policy_s=sum(ticks[level] for ticks in spent) / TICKS_PER_SECOND,
        )


def _classes(
    records: Sequence[AdaptiveRecord], result: RunResult, requests: RequestTable, basis: Basis
) -> Iterator[ClassUse]:
    if requests.request_class is None:
        return
    sent_s, first_s, last_s = result.log.client_seconds()
    for index, name in enumerate(requests.class_names):
        members = (requests.request_class == index) & (last_s >= 0)
        gaps = requests.output_tokens - 1
        several = members & (gaps > 0)
        tokens = [sum(column) for column in zip(*(record.tokens[index] for record in records), strict=True)]
        ttft = of_samples((first_s - sent_s)[members]).p99_s
        tpot = of_samples((last_s - first_s)[several] / gaps[several]).median_s
        yield ClassUse(
            name=name,
            completed=int(members.sum()),
            tokens_decoded=tuple(tokens),
            reduced_share=_share(tokens),
            ttft_p99_s=Figure(value=ttft, basis=basis if ttft is not None else None),
            tpot_median_s=Figure(value=tpot, basis=basis if tpot is not None else None),
        )
