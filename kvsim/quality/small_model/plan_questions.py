"""Which totals and candidates layer plans are tried with on the small models. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

from kvsim.compression.parse import parse_part
from kvsim.compression.strategy import spell
from kvsim.quality.layer_plans import SHARE_UNITS, Option, encoding_options, selection_options, uniform

SHARES: Final = tuple(4 * sixteenths for sixteenths in (1, 2, 3, 4, 6, 8, 10, 12, 16))
"""64ths of the prompt; the smallest holds SnapKV's window of 16 of 256 tokens."""
FINE_SHARES: Final = tuple(4 * sixteenths for sixteenths in range(1, 17))
"""For models of two caches: of the others no two add up to such budgets as PyramidKV's, 15 and 1 sixteenths."""
CANDIDATES: Final = ("streaming_llm", "snapkv", "h2o", "tova", "knorm", "keydiff", "expected_attention")
ENSEMBLE_CANDIDATES: Final = ("streaming_llm", "snapkv", "h2o", "keydiff")
"""Fewer, and at fewer sizes: ensembles are longer."""
ENSEMBLE_SHARES: Final = (4, 8, 12, 16, 24, 32, 40, 48, 64)
UNIFORM_ONLY: Final = ("pyramidkv", "random")
"""PyramidKV moves budget between layers itself and is SnapKV within one; random eviction is there to be beaten."""
TURBOQUANT_BITS: Final = (1, 2, 3, 4)
DECODE_TARGETS: Final = (16, 32, 64, 96, 128, 192)
"""Tokens that a layer may hold after a cut."""
DECODE_UNIT: Final = 16
DECODE_SCORERS: Final = ("keydiff", "tova")
DECODE_INTERVAL: Final = 32
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
    extra : tuple of Option
        What every layer may be given alike beside the options of that cost.
    """

    name: str
    options: tuple[Option, ...]
    units_per_layer: int
    extra: tuple[Option, ...] = ()

    @property
    def uniforms(self) -> dict[str, str]:
        """Policies that every layer may be given alike: name to strategy."""
        alike = (option for option in self.options if option.cost == self.units_per_layer)
        return {option.policy: uniform(option).name for option in (*alike, *self.extra)}


def questions(
    candidates: Sequence[str] = CANDIDATES, shares: Sequence[int] = SHARES, *, window_size: int | None = 16
) -> tuple[Question, ...]:
    """Totals that are asked about; ``window_size`` is SnapKV's and PyramidKV's, None for their default."""
    window = "" if window_size is None else f"(window_size={window_size})"
    sized = [f"snapkv{window}" if name == "snapkv" else name for name in candidates]
    others = [f"pyramidkv{window}" if name == "pyramidkv" else name for name in UNIFORM_ONLY]
    options = selection_options(sized, shares)
    keep = [
        Question(f"keep {100 * units // SHARE_UNITS} %", options, units, selection_options(others, (units,)))
        for units in (SHARE_UNITS // 4, SHARE_UNITS // 2)
    ]
    return (*keep, Question("TurboQuant, K + V = 4 bits", _bits(), 4))


def decode_question() -> Question:
    """One total while decoding: 64 tokens per layer are left by every cut of a text of about 280.

    H2O and StreamingLLM hold a number of tokens by themselves; of the others, what kvpress's DecodingPress does with a
    scorer.
    """
    names: dict[str, tuple[str, int]] = {}
    for tokens in DECODE_TARGETS:
        names |= {f"{name}:{tokens}": (name, tokens) for name in ("streaming_llm", "h2o")}
        for scorer in DECODE_SCORERS:
            names[f"decoding:{tokens}(decoding={scorer},compression_interval={DECODE_INTERVAL})"] = (scorer, tokens)
    spelled = {name: spell(parse_part(name)) for name in names}
    options = {Option(spelled[name], policy, tokens // DECODE_UNIT) for name, (policy, tokens) in names.items()}
    ordered = tuple(sorted(options, key=lambda one: (one.policy, one.cost)))
    return Question("decode, 64 tokens", ordered, 64 // DECODE_UNIT)


def shares_for(num_caches: int) -> tuple[int, ...]:
    """Sizes that a layer of a model may have."""
    return SHARES if num_caches > 2 else FINE_SHARES


def _bits() -> tuple[Option, ...]:
    """TurboQuant with every split between K and V; what is split how is the policy, the sum of both the budget."""
    pairs = list(product(TURBOQUANT_BITS, repeat=2))
    names = {pair: f"turboquant_mse:{pair[0]}(value_bits={pair[1]})" for pair in pairs}
    policies = {names[k, v]: "even" if k == v else "more for keys" if k > v else "more for values" for k, v in pairs}
    return encoding_options({names[pair]: sum(pair) for pair in pairs}, policies)
