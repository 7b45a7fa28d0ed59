"""A layer plan from caches or from a model, and how it does on sequences that it was not made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from kvsim.compression import Compression
from kvsim.compression.base import KvEncoding
from kvsim.compression.parse import parse_part
from kvsim.compression.selection.base import TokenSelection
from kvsim.compression.selector import layer_view
from kvsim.compression.strategy import spell
from kvsim.errors import InvalidSpec
from kvsim.quality.layer_plans import (
    DEFAULT_SHARES,
    SHARE_UNITS,
    Option,
    Sensitivity,
    best_plan,
    encoding_options,
    local_harms,
    local_sensitivity,
    planned,
    predicted_harm,
    selection_options,
    sensitivity_by,
    uniform,
)
from kvsim.specs.base import DTYPE_BITS, Dtype
from kvsim.tensors import KvTensors

BIT_UNITS: Final = 16
"""Units of an encoding's cost: sixteenths of a bit per element, metadata counted."""
Measure = Literal["kl", "local"]
Harm = Callable[[Compression], float]
Progress = Callable[[float], None] | None


@dataclass(frozen=True)
class Budget:
    """What all layers together may take, per layer: a share of the prompt's tokens, or bits per element."""

    keep: float | None = None
    bits: float | None = None

    @property
    def units_per_layer(self) -> int:
        """In the units of options; raise InvalidSpec where neither or both are given, or it is no whole number."""
        if (self.keep is None) == (self.bits is None):
            msg = "give one of --keep (candidates are token selections) and --bits (candidates are encodings)"
            raise InvalidSpec(msg)
        if self.bits is not None:
            return int(self.bits * BIT_UNITS)
        units = (self.keep or 0.0) * SHARE_UNITS
        if units != int(units) or not 0 < units < SHARE_UNITS:
            msg = f"--keep {self.keep}: a share above 0 and below 1 in whole {SHARE_UNITS}ths, such as 0.25"
            raise InvalidSpec(msg)
        return int(units)


@dataclass(frozen=True, eq=False)
class MadePlan:
    """A plan beside the best uniform policy at the same total.

    Attributes
    ----------
    options : tuple of Option
        One per layer.
    sensitivity : Sensitivity
    uniform : Option
        What is best for all layers alike, on the calibration sequences as a whole.
    predicted : float
        Sum of single layers' harms.
    calibrated, calibrated_uniform : float
        Harm of both, measured as a whole, on calibration sequences.
    held_out, held_out_uniform : float or None
        The same on sequences that the plan was not made from; None where there are none.
    """

    options: tuple[Option, ...]
    sensitivity: Sensitivity
    uniform: Option
    predicted: float
    calibrated: float
    calibrated_uniform: float
    held_out: float | None
    held_out_uniform: float | None

    @property
    def compression(self) -> Compression:
        """The plan as a strategy."""
        return planned(self.options)


def options_for(candidates: Sequence[str], budget: Budget, kv: KvTensors) -> tuple[Option, ...]:
    """Options of candidates: selections at shares of the prompt, or encodings with the bits that they take.

    Raises
    ------
    InvalidSpec, UnknownName
        Candidates are of both kinds, or not of the budget's.
    """
    units = budget.units_per_layer
    parts = [parse_part(name) for name in candidates]
    if budget.keep is not None and all(isinstance(part, TokenSelection) for part in parts):
        least = _least_share(candidates, kv.layers[0].num_tokens)
        shares = {*(share for share in DEFAULT_SHARES if share >= least), units}
        return selection_options(candidates, sorted(shares))
    encodings = [part for part in parts if isinstance(part, KvEncoding)]
    if budget.bits is not None and len(encodings) == len(parts):
        return encoding_options({spell(part): _bit_units(part, kv) for part in encodings})
    msg = f"candidates {', '.join(candidates)}: token selections go with --keep, encodings with --bits, and never both"
    raise InvalidSpec(msg)


def _least_share(candidates: Sequence[str], tokens: int) -> int:
    """Smallest share at which no candidate keeps more than it: windows and sinks always stay."""
    windows = [getattr(parse_part(name), "window_size", 0) for name in candidates]
    return -(-max(windows) * SHARE_UNITS // tokens)


def _bit_units(encoding: KvEncoding, kv: KvTensors) -> int:
    group = layer_view(kv, 0).group
    stored = encoding.bytes_per_token(group, Dtype.BF16).total_bytes
    native = group.kv_elements_per_token * DTYPE_BITS[Dtype.BF16] / 8
    return round(DTYPE_BITS[Dtype.BF16] * BIT_UNITS * stored / native)


def plan_from_caches(
    caches: Sequence[KvTensors],
    candidates: Sequence[str],
    budget: Budget,
    *,
    held_out: Sequence[KvTensors] = (),
    progress: Progress = None,
) -> MadePlan:
    """Plan by local deviation: squared relative error of outputs. Harm of a whole is its mean over layers."""
    options = options_for(candidates, budget, caches[0])
    found = local_sensitivity(caches, options, caches, progress)
    on = [_mean_local(some, caches) for some in (caches, held_out) if some]
    return _made(found, budget, on[0], on[1] if len(on) > 1 else None, caches[0].num_layers)


def _mean_local(measured: Sequence[KvTensors], samples: Sequence[KvTensors]) -> Harm:
    return lambda compression: float(local_harms(compression, measured, samples).mean())


def plan_by_kl(
    harm: Harm,
    options: Sequence[Option],
    num_layers: int,
    budget: Budget,
    *,
    held_out: Harm | None = None,
    progress: Progress = None,
) -> MadePlan:
    """Plan by what the model says next: ``harm`` gives the mean KL of a strategy on calibration sequences, in nats."""
    return _made(sensitivity_by(harm, options, num_layers, progress), budget, harm, held_out, 1)


def _made(found: Sensitivity, budget: Budget, harm: Harm, held_out: Harm | None, parts: int) -> MadePlan:
    """``parts``: by how much the sum of single harms exceeds the harm of a whole (a mean over layers)."""
    units = budget.units_per_layer
    chosen = best_plan(found, units, exactly=budget.bits is None)
    alike = _best_uniform(found, units, harm, is_exact=budget.bits is None)
    both = planned(chosen), uniform(alike)
    tested = (None, None) if held_out is None else (held_out(both[0]), held_out(both[1]))
    return MadePlan(chosen, found, alike, predicted_harm(found, chosen) / parts, harm(both[0]), harm(both[1]), *tested)


def _best_uniform(found: Sensitivity, units: int, harm: Harm, *, is_exact: bool) -> Option:
    fitting = [one for one in found.options if one.cost == units or (not is_exact and one.cost < units)]
    if not fitting:
        msg = f"no candidate alone fits the total of {units / BIT_UNITS:g} bits per element; give a larger one"
        raise InvalidSpec(msg)
    return min(fitting, key=lambda one: (harm(uniform(one)), one.name))
