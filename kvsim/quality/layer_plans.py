"""Make a layer plan: what each option does to the output by itself, layer by layer, and the best choice at a total.

PolyKV-style (arXiv 2606.15157). From the abstract: each layer is given one of several existing policies and a budget of
its own under a fixed total. From secondary notes: an offline calibration measures per layer how far each policy moves
the output from the full cache. Ours: both measures, the sum of single layers' harms as the harm of all, and the exact
allocation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from kvsim.compression import Compression
from kvsim.compression.encoding.native import Native
from kvsim.compression.parse import parse_part
from kvsim.compression.selection.base import TokenSelection
from kvsim.compression.selection.keep_all import KeepAll
from kvsim.compression.strategy import PlannedEncodings, PlannedSelections, spell
from kvsim.documents import validate
from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import DoubleArray
from kvsim.numerics.option_allocation import allocate_options
from kvsim.quality.measure import compare_caches
from kvsim.quality.store import fit_strategy, needs_calibration, store_cache
from kvsim.tensors import KvTensors

SHARE_UNITS: Final = 64
"""Units of a selection's budget: 64ths of the prompt, which a float holds exactly."""
DEFAULT_SHARES: Final = (4, 8, 12, 16, 24, 32, 40, 48, 64)
"""64ths of the prompt that a layer may keep."""
Freedom = Literal["policy and budget", "policy", "budget"]
"""What a plan may choose per layer: both; the policy alone, at equal budgets; budgets alone, under one policy."""


@dataclass(frozen=True)
class Option:
    """What a layer may be given.

    Attributes
    ----------
    name : str
        Selection or encoding, spelled.
    policy : str
        The candidate that it is a size of; empty for what all candidates share (everything kept, stored natively).
    cost : int
        Units: 64ths of the prompt kept, or whatever the options of encodings count.
    """

    name: str
    policy: str
    cost: int

    @property
    def is_free_of_harm(self) -> bool:
        """Whether it leaves the cache as it is."""
        return not self.policy


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Harm of each option in each layer, every other layer being as it was.

    Attributes
    ----------
    options : tuple of Option
        In an order of their own (policy, cost), whatever the order they were named in.
    harms : (L, O)
        KL in nats, or squared relative error of outputs; 0 where nothing is lost.
    """

    options: tuple[Option, ...]
    harms: DoubleArray

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.harms)

    @property
    def policies(self) -> tuple[str, ...]:
        """The candidates."""
        return tuple(dict.fromkeys(option.policy for option in self.options if option.policy))


def selection_options(candidates: Sequence[str], shares: Sequence[int] = DEFAULT_SHARES) -> tuple[Option, ...]:
    """Every candidate at every share of the prompt, in 64ths; 64 keeps all tokens, which needs no candidate.

    Raises
    ------
    InvalidSpec, UnknownName
        A candidate is no selection that a compression_ratio sizes, or a share is not among 1 to 64.
    """
    if not shares or not all(0 < share <= SHARE_UNITS for share in shares):
        msg = f"shares {list(shares)}: whole 64ths of the prompt, 1 to {SHARE_UNITS}"
        raise InvalidSpec(msg)
    found = {Option(spell(KeepAll()), "", SHARE_UNITS)} if SHARE_UNITS in shares else set()
    for candidate in candidates:
        sizes = [(share, _sized(candidate, share)) for share in shares if share < SHARE_UNITS]
        found |= {Option(spell(one), _policy(candidate), share) for share, one in sizes}
    return _in_order(found)


def encoding_options(costs: Mapping[str, int], policies: Mapping[str, str] | None = None) -> tuple[Option, ...]:
    """Encodings by name with what each costs, in units of one's own.

    ``policies`` says of which policy each is a size; without them each is a policy of its own.
    """
    spelled = {name: spell(parse_part(name)) for name in costs}
    return _in_order({Option(spelled[name], (policies or spelled)[name], cost) for name, cost in costs.items()})


def _in_order(options: set[Option]) -> tuple[Option, ...]:
    return tuple(sorted(options, key=lambda one: (one.policy, one.cost, one.name)))


def _sized(candidate: str, share: int) -> TokenSelection:
    part = parse_part(candidate)
    if not isinstance(part, TokenSelection) or "compression_ratio" not in type(part).model_fields:
        msg = f"candidate {candidate!r} is no token selection that a compression_ratio sizes, such as snapkv or h2o"
        raise InvalidSpec(msg)
    fields = part.model_dump() | {"compression_ratio": 1.0 - share / SHARE_UNITS}
    fields = {name: value for name, value in fields.items() if name not in ("budget_tokens", "window_length")}
    return validate(type(part), fields, f"candidate {candidate!r}")


def _policy(candidate: str) -> str:
    """Name of a candidate without a size."""
    return re.sub(r":0\.5(?=\(|$)", "", spell(_sized(candidate, SHARE_UNITS // 2)))


def uniform(option: Option) -> Compression:
    """Give every layer the same."""
    part = parse_part(option.name)
    return Compression(selection=part) if isinstance(part, TokenSelection) else Compression(encoding=part)


def planned(options: Sequence[Option]) -> Compression:
    """Give each layer its own option; a list whose entries are all the same stays a plan."""
    parts = [parse_part(option.name) for option in options]
    if isinstance(parts[0], TokenSelection):
        return Compression(selection=PlannedSelections(layers=parts))
    return Compression(encoding=PlannedEncodings(layers=parts))


def alone(option: Option, layer: int, num_layers: int) -> Compression:
    """Give one layer the option and leave the others as they are."""
    is_selection = isinstance(parse_part(option.name), TokenSelection)
    nothing = Option(spell(KeepAll() if is_selection else Native()), "", 0)
    return planned([option if index == layer else nothing for index in range(num_layers)])


def sensitivity_by(
    measure: Callable[[Compression], float],
    options: Sequence[Option],
    num_layers: int,
    progress: Callable[[float], None] | None = None,
) -> Sensitivity:
    """Measure each option in each layer alone: ``measure`` gives the harm of a whole strategy, such as its KL."""
    options = _in_order(set(options))
    harms = np.zeros((num_layers, len(options)))
    for index, option in enumerate(options):
        if progress is not None:
            progress(index / len(options))
        if not option.is_free_of_harm:
            harms[:, index] = [measure(alone(option, layer, num_layers)) for layer in range(num_layers)]
    return Sensitivity(options, harms)


def local_sensitivity(
    caches: Sequence[KvTensors],
    options: Sequence[Option],
    samples: Sequence[KvTensors] = (),
    progress: Callable[[float], None] | None = None,
) -> Sensitivity:
    """Measure how far each layer's own attention output moves: the cheap form, which needs no model.

    Harm is the squared relative error of outputs, mean over heads and caches. All layers are measured in one go.
    """
    options = _in_order(set(options))
    harms = np.zeros((caches[0].num_layers, len(options)))
    for index, option in enumerate(options):
        if progress is not None:
            progress(index / len(options))
        if not option.is_free_of_harm:
            harms[:, index] = local_harms(uniform(option), caches, samples)
    return Sensitivity(options, harms)


def local_harms(
    compression: Compression, caches: Sequence[KvTensors], samples: Sequence[KvTensors] = ()
) -> DoubleArray:
    """Squared relative error of each layer's outputs, (L,), mean over heads and caches."""
    fitted = fit_strategy(compression, samples if needs_calibration(compression) else ())
    total = np.zeros(caches[0].num_layers)
    for kv in caches:
        heads = compare_caches(kv, store_cache(fitted, kv)).heads
        found = np.array([(head.layer, head.output_error**2) for head in heads])
        total += np.bincount(found[:, 0].astype(int), weights=found[:, 1]) / np.bincount(found[:, 0].astype(int))
    return np.asarray(total / len(caches))


def best_plan(
    found: Sensitivity,
    units_per_layer: int,
    freedom: Freedom = "policy and budget",
    policy: str | None = None,
    *,
    exactly: bool = True,
) -> tuple[Option, ...]:
    """Options of least summed harm, one per layer, that together cost exactly ``units_per_layer`` times the layers.

    ``policy`` is the one to keep to where only budgets are free. Not ``exactly``: at most, where costs are of
    formats and need not add up.

    Raises
    ------
    InvalidSpec
        The options do not add up to the total, or no such policy is among them.
    """
    allowed = np.ones(len(found.options), dtype=bool)
    if freedom == "policy":
        allowed = np.array([option.cost == units_per_layer for option in found.options])
    if freedom == "budget":
        allowed = np.array([option.policy in ("", policy) for option in found.options])
    costs = np.array([option.cost for option in found.options], dtype=np.int64)
    harms = np.where(allowed, found.harms, np.inf)
    try:
        chosen = allocate_options(costs, harms, units_per_layer * found.num_layers, exactly=exactly)
    except ValueError as error:
        msg = f"no plan of {found.num_layers} layers at {units_per_layer} units per layer with {freedom} free: {error}"
        raise InvalidSpec(msg) from error
    return tuple(found.options[index] for index in chosen)


def predicted_harm(found: Sensitivity, plan: Sequence[Option]) -> float:
    """Sum of the single layers' harms."""
    return float(sum(found.harms[layer, found.options.index(option)] for layer, option in enumerate(plan)))
