"""A layer plan as a table and as plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from kvsim.quality.plan_runs import MadePlan


def plan_document(made: MadePlan) -> dict[str, Any]:
    """Give a plan with its figures; what is unknown is None."""
    return {
        "strategy": made.compression.name,
        "layers": [option.name for option in made.options],
        "predicted_harm": made.predicted,
        "calibration_harm": made.calibrated,
        "best_uniform": made.uniform.name,
        "best_uniform_calibration_harm": made.calibrated_uniform,
        "held_out_harm": made.held_out,
        "best_uniform_held_out_harm": made.held_out_uniform,
    }


def plan_table(made: MadePlan, source: str) -> Table:
    """Show what each layer is given, and what the best uniform policy would do to it by itself."""
    from rich import box
    from rich.table import Table

    table = Table(title=source, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in ("layer", "given", "harm alone", f"harm of {made.uniform.name}"):
        table.add_column(name, justify="left" if name == "given" else "right")
    found = made.sensitivity
    for layer, option in enumerate(made.options):
        mine, theirs = (found.harms[layer, found.options.index(one)] for one in (option, made.uniform))
        table.add_row(str(layer), option.name, f"{mine:.3g}", f"{theirs:.3g}")
    table.add_section()
    rows = (("sum or mean", made.predicted, None), ("measured as a whole", made.calibrated, made.calibrated_uniform))
    for name, plan, alike in (*rows, ("on held-out sequences", made.held_out, made.held_out_uniform)):
        table.add_row("", name, _number(plan), _number(alike))
    return table


def plan_advice(made: MadePlan) -> str | None:
    """Say so where the plan does not beat one policy for all layers on sequences that neither saw."""
    plan, alike = made.held_out, made.held_out_uniform
    if plan is None or alike is None or plan < alike:
        return None
    return f"on held-out sequences the plan is no better than {made.uniform.name} in every layer"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
