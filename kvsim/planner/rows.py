"""A plan's points as flat rows, for spreadsheets and data frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvsim.planner.answer import Estimated, Plan, PlanPoint, Simulated

if TYPE_CHECKING:
    import polars as pl

_TEXT = ("name", "device", "strategy")
_COUNTS = ("tensor_parallel_size", "replicas", "num_devices")


def to_frame(answer: Plan) -> pl.DataFrame:
    """One row per point, in the plan's order; what is unknown is empty."""
    import polars as pl

    rows = [_row(point, answer) for point in answer.points]
    return pl.DataFrame(rows, infer_schema_length=None)


def _row(point: PlanPoint, answer: Plan) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(point, name) for name in (*_TEXT, *_COUNTS)}
    row |= point.settings
    row |= {f"estimated_{name}": getattr(point.estimated, name) for name in Estimated.model_fields}
    row |= {f"simulated_{name}": getattr(point.simulated, name, None) for name in Simulated.model_fields}
    row["small_model_kl_nats"] = None if point.risk is None else point.risk.kl_nats
    for task in answer.request.floors:
        held = next(one for one in point.quality if one.task_class == task)
        row[f"published_share_{task.replace(' ', '_')}"] = held.share
    row["picked_for"] = "; ".join(
        f"{pick} on {device.device}"
        for device in answer.devices
        for pick, chosen in (("runs today", device.runs_today), ("cheapest", device.cheapest))
        if chosen is not None and chosen.name == point.name
    )
    row["marks"] = "; ".join(point.marks)
    row["limit"] = point.limit
    row |= {f"against_{one.baseline}": one.decides for one in point.compared}
    row["command"] = point.commands[0].line if point.commands else point.not_shipped
    row["scenario_json"] = point.scenario.model_dump_json()
    return row
