"""Which totals and candidates layer plans are tried with on the small models. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kvsim.quality.layer_plans import SHARE_UNITS, Option, encoding_options, selection_options, uniform

SHARES: Final = tuple(4 * sixteenths for sixteenths in (1, 2, 3, 4, 6, 8, 10, 12, 16))
"""64ths of the prompt; the smallest holds SnapKV's window of 16 of 256 tokens."""
CANDIDATES: Final = (
    "streaming_llm", "snapkv(window_size=16)", "h2o", "tova", "knorm", "keydiff", "expected_attention",
)  # fmt: skip
UNIFORM_ONLY: Final = ("pyramidkv(window_size=16)", "random")
"""PyramidKV moves budget between layers itself and is SnapKV within one; random eviction is there to be beaten."""
TURBOQUANT_BITS: Final = (1, 2, 3, 4)
FEW_TASKS: Final = ("copy", "language")
"""What the transfer test calibrates on."""


@dataclass(frozen=True)
class Question:
    """One total budget.

    Attributes
    ----------
    name : str
        Such as ``keep 25 %``.
    options : tuple of Option
    units_per_layer : int
    uniforms : dict
        Name to strategy: what every layer may be given alike.
    """

    name: str
    options: tuple[Option, ...]
    units_per_layer: int
    uniforms: Mapping[str, str]


def questions(candidates: Sequence[str] = CANDIDATES) -> tuple[Question, ...]:
    """Totals that are asked about."""
    options = selection_options(candidates, SHARES)
    keep = [_keep(options, units) for units in (SHARE_UNITS // 4, SHARE_UNITS // 2)]
    bits = encoding_options(
        {
            f"turboquant_mse:{key}(value_bits={value})": key + value
            for key in TURBOQUANT_BITS
            for value in TURBOQUANT_BITS
        }
    )
    alike = {option.name: uniform(option).name for option in bits if option.cost == 4}
    return (*keep, Question("TurboQuant, K + V = 4 bits", bits, 4, alike))


def _keep(options: tuple[Option, ...], units: int) -> Question:
    alike = {option.policy: uniform(option).name for option in options if option.cost == units}
    others = {option.policy: uniform(option).name for option in selection_options(UNIFORM_ONLY, (units,))}
    return Question(f"keep {100 * units // SHARE_UNITS} %", options, units, {**alike, **others})
