"""Scorers by their published names, and what wrappers share that put one of them to another use.

A wrapper (Ada-KV, chunks, compression during decode) names a scorer, such as ``adakv:0.5(scorer=snapkv)``; the scorer
has its default parameters and the wrapper's budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Final, Self

from pydantic import AfterValidator, Field, model_validator

from kvsim.compression.selection.cur import Cur
from kvsim.compression.selection.expected_attention import ExpectedAttention
from kvsim.compression.selection.full_attention import BudgetedSelection
from kvsim.compression.selection.infokv import InfoKV
from kvsim.compression.selection.keydiff import KeyDiff
from kvsim.compression.selection.knorm import Knorm
from kvsim.compression.selection.lagkv import LagKv
from kvsim.compression.selection.pyramidkv import PyramidKV
from kvsim.compression.selection.random import RandomEviction
from kvsim.compression.selection.rkv import RKV
from kvsim.compression.selection.scored import ScoredSelection
from kvsim.compression.selection.snapkv import SnapKV
from kvsim.compression.selection.tova import Tova
from kvsim.compression.spelling import normalised
from kvsim.documents import validate
from kvsim.errors import UnknownName

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import SignalName

SCORERS: Final[Mapping[str, type[ScoredSelection]]] = {
    "cur": Cur,
    "expected_attention": ExpectedAttention,
    "infokv": InfoKV,
    "keydiff": KeyDiff,
    "knorm": Knorm,
    "lagkv": LagKv,
    "pyramidkv": PyramidKV,
    "random": RandomEviction,
    "rkv": RKV,
    "snapkv": SnapKV,
    "tova": Tova,
}
"""Published name -> the selection that scores so. A new ScoredSelection joins with one line."""


def scorer_class(name: str) -> type[ScoredSelection]:
    """Give the class of a scorer, by its name, an alias or kvpress's class name; raise UnknownName."""
    wanted = normalised(name)
    for known, scorer in SCORERS.items():
        if wanted in map(normalised, (known, *scorer.aliases)):
            return scorer
    raise UnknownName(kind="scorer", name=name, known=SCORERS)


def named_scorer(
    name: str, *, compression_ratio: float | None = None, budget_tokens: int | None = None
) -> ScoredSelection:
    """Give a scorer of default parameters with a budget of one kind; raise InvalidSpec where it cannot have it."""
    size: dict[str, object] = {"compression_ratio": compression_ratio, "budget_tokens": budget_tokens}
    given = {field: value for field, value in size.items() if value is not None}
    return validate(scorer_class(name), given, f"scorer {name!r}")


def known_scorer(name: str) -> str:
    """Canonical name of a scorer; raise ValueError where there is none."""
    try:
        found = scorer_class(name)
    except UnknownName as error:
        raise ValueError(str(error)) from None
    return next(known for known, scorer in SCORERS.items() if scorer is found)


ScorerName = Annotated[str, AfterValidator(known_scorer)]
"""The name of a scorer, as a field of a wrapper."""


class ScorerBackedSelection(BudgetedSelection):
    """A selection that puts the scores of another to a use of its own, with a budget of the same kind."""

    scorer: Annotated[ScorerName, Field(validate_default=True)] = "snapkv"
    """Whose scores, by published name, with its default parameters."""

    @model_validator(mode="after")
    def _scorer_takes_budget(self) -> Self:
        _ = self.scored
        return self

    @property
    def scored(self) -> ScoredSelection:
        """The scorer with this budget."""
        return named_scorer(self.scorer, compression_ratio=self.compression_ratio, budget_tokens=self.budget_tokens)

    @property
    def query_aware(self) -> bool:
        return self.scored.query_aware

    @property
    def needs_signals(self) -> frozenset[SignalName]:
        return self.scored.needs_signals

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        return super().check(model, device) or self.scored.check(model, device)
