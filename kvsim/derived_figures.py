"""Numbers that are worked out of a report's other numbers, for the table of metrics."""

from __future__ import annotations

from collections.abc import Callable

from kvsim.ops import Component
from kvsim.report import Figure, Report, TiersUse
from kvsim.specs.base import Basis


def tokens_per_second_per_user(report: Report) -> Figure:
    """Speed that one user sees: 1 / median TPOT (InferenceX's interactivity), 1 / mean where no median is known."""
    stats = report.latency.tpot
    tpot = stats.median_s if stats.median_s.value is not None else stats.mean_s
    return Figure(value=_inverse(tpot.value), low=_inverse(tpot.high), high=_inverse(tpot.low), basis=tpot.basis)


def transfer_figure(field: str) -> Callable[[Report], Figure]:
    """A number of the transfers between two pools; unknown where there is one pool."""

    def figure(report: Report) -> Figure:
        if report.disaggregation is None:
            return Figure(value=None)
        value = getattr(report.disaggregation.transfer, field)
        return value if isinstance(value, Figure) else Figure(value=value)

    return figure


def pool_utilization(role: str) -> Callable[[Report], Figure]:
    """Share of the run in which a pool's engines were busy; unknown where there is no such pool."""

    def figure(report: Report) -> Figure:
        pools = report.disaggregation.pools if report.disaggregation is not None else ()
        return next((pool.utilization for pool in pools if pool.role == role), Figure(value=None))

    return figure


def _inverse(value: float | None) -> float | None:
    return 1.0 / value if value else None


def output_throughput_per_device(report: Report) -> Figure:
    """Output tokens per second and device, over all replicas and ranks."""
    num_devices = report.scenario.num_devices
    rate = report.throughput.output_throughput
    per_device = [None if value is None else value / num_devices for value in (rate.value, rate.low, rate.high)]
    return Figure(value=per_device[0], low=per_device[1], high=per_device[2], basis=rate.basis)


def time_share(component: Component) -> Callable[[Report], Figure]:
    """Share of busy time spent on a component, in both phases."""

    def share(report: Report) -> Figure:
        parts = [part for part in report.time_split if part.component is component]
        if not parts:
            return Figure(value=0.0 if report.time_split else None)
        return Figure(value=sum(part.share for part in parts), basis=_weakest([part.basis for part in parts]))

    return share


def basis_share(basis: Basis) -> Callable[[Report], Figure]:
    """Share of busy time priced on a basis."""

    def share(report: Report) -> Figure:
        if not report.coverage:
            return Figure(value=None)
        return Figure(value=sum(part.share for part in report.coverage if part.basis is basis))

    return share


def adaptive_figure(report: Report, field: str) -> Figure:
    """A number of the adaptive section; unknown where nothing adapts."""
    value = getattr(report.adaptive, field) if report.adaptive is not None else None
    return value if isinstance(value, Figure) else Figure(value=None if value is None else float(value))


def _weakest(bases: list[Basis]) -> Basis:
    order = list(Basis)
    return max(bases, key=order.index)


def tier_figure(read_use: Callable[[TiersUse], float | None]) -> Callable[[Report], Figure]:
    """A number of the tiers; unknown where there are none."""
    return lambda report: Figure(value=read_use(report.tiers) if report.tiers is not None else None)


def tier_hit_rate(*kinds: str) -> Callable[[Report], Figure]:
    """Share of the tokens looked up that was loaded from tiers of some kinds; unknown where there is no such tier."""

    def rate(use: TiersUse) -> float | None:
        found = [tier.hit_rate for tier in use.tiers if tier.kind in kinds and tier.hit_rate is not None]
        return sum(found) if found else None

    return tier_figure(rate)


def tier_wait_s(use: TiersUse) -> float | None:
    """Mean wait of a load, over all tiers."""
    loads = sum(tier.loads for tier in use.tiers)
    return sum(tier.loads * (tier.wait_mean_s or 0.0) for tier in use.tiers) / loads if loads else None
