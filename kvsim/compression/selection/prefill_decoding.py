"""One scorer for the prompt, one while decoding: kvpress's PrefillDecodingPress and DecodingPress."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from kvsim.compression.base import LayerView
from kvsim.compression.selection.cuts import CutsWhileDecoding
from kvsim.compression.selection.full_attention import whole_tokens
from kvsim.compression.selection.scored import ScoredSelection
from kvsim.compression.selection.scorers import ScorerName, known_scorer, named_scorer

if TYPE_CHECKING:
    from kvsim.ops import OpCall
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import IntArray, KvTensors, LayerKv, SignalName

DEFAULT_TARGET_SIZE = 2048
DEFAULT_INTERVAL = 512
WHOLE_PROMPT = "keep_all"


def _scorer_or_none(name: str) -> str:
    return WHOLE_PROMPT if name == WHOLE_PROMPT else known_scorer(name)


class PrefillDecoding(CutsWhileDecoding):
    """The prompt by the scorer ``prefilling``, and every ``compression_interval`` steps a cut by ``decoding``.

    Defaults of kvpress. Scorers have their own default parameters. ``target_size`` tokens are left by each cut in each
    layer, and of the prompt too unless ``compression_ratio`` states a share of its own. A cache that has not grown
    above the target is left alone.
    """

    names: ClassVar = {
        "prefill_decoding": {"target_size": DEFAULT_TARGET_SIZE, "prefilling": "snapkv"},
        "decoding": {"target_size": DEFAULT_TARGET_SIZE, "prefilling": WHOLE_PROMPT},
    }
    aliases: ClassVar = {"prefilldecoding": "prefill_decoding"}
    summaries: ClassVar = {
        "prefill_decoding": "SnapKV's scores unless others are named, to 2,048 tokens after the prompt and every 512 "
        "decoded ones; kvpress",
        "decoding": "SnapKV's scores unless others are named, to 2,048 tokens every 512 decoded ones, the prompt left "
        "alone; kvpress",
    }
    inline_fields: ClassVar = ("target_size",)
    family: ClassVar = "eviction"

    kind: Literal["prefill_decoding"] = "prefill_decoding"
    prefilling: Annotated[str, AfterValidator(_scorer_or_none), Field(validate_default=True)] = "snapkv"
    """Whose scores cut the prompt; ``keep_all`` leaves it whole until the first cut."""
    decoding: Annotated[ScorerName, Field(validate_default=True)] = "snapkv"
    target_size: PositiveInt
    compression_interval: Annotated[int, Field(ge=1)] = DEFAULT_INTERVAL
    compression_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the prompt removed when it ends, where that is not to be ``target_size``."""

    @model_validator(mode="after")
    def _scorers_take_target(self) -> Self:
        _ = self.prompt_scorer, self.decode_scorer
        if self.prefilling == WHOLE_PROMPT and self.compression_ratio is not None:
            msg = f"compression_ratio {self.compression_ratio} needs a scorer as prefilling, not {WHOLE_PROMPT}"
            raise ValueError(msg)
        return self

    @property
    def prompt_scorer(self) -> ScoredSelection | None:
        """The scorer with the prompt's budget, or None where nothing of the prompt leaves at once."""
        if self.prefilling == WHOLE_PROMPT:
            return None
        ratio = self.compression_ratio
        size = self.target_size if ratio is None else None
        return named_scorer(self.prefilling, compression_ratio=ratio, budget_tokens=size)

    @property
    def decode_scorer(self) -> ScoredSelection:
        return named_scorer(self.decoding, budget_tokens=self.target_size)

    def decode_target(self, prompt_tokens: int) -> int:
        return self.target_size

    def kept_after_prompt(self, prompt_tokens: int, layer: LayerView) -> int:
        scorer = self.prompt_scorer
        return prompt_tokens if scorer is None else scorer.kept_tokens(prompt_tokens, layer)

    def keep(self, kv: KvTensors, layer: LayerView) -> IntArray | None:
        scorer = self.prompt_scorer
        return None if scorer is None else scorer.keep(kv, layer)

    def prefill_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        """Work of the prompt's scorer, and what the other takes down of the prompt for later cuts (InfoKV)."""
        scorer = self.prompt_scorer
        calls = () if scorer is None else tuple(scorer.prefill_ops(prompt_tokens, layer, model))
        done = {call.name for call in calls}
        taken_down = self.decode_scorer.signal_ops(prompt_tokens, layer, model)
        return (*(call for call in taken_down if call.name not in done), *calls)

    def decode_ops(self, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        return self.decode_scorer.step_signal_ops(layer, model)

    def held_bytes_per_token(self, layer: LayerView) -> float:
        return self.decode_scorer.held_bytes_per_token(layer)

    def index_bits(self, layer_kv: LayerKv, layer: LayerView, native_bits: int) -> float:
        return self.decode_scorer.index_bits(layer_kv, layer, native_bits)

    @property
    def needs_signals(self) -> frozenset[SignalName]:
        scorer = self.prompt_scorer
        return self.decode_scorer.needs_signals | (frozenset() if scorer is None else scorer.needs_signals)

    def layer_band(self, layer: LayerView) -> int:
        scorer = self.prompt_scorer
        return 0 if scorer is None else scorer.layer_band(layer)

    @property
    def keeps_newest(self) -> bool:
        scorer = self.prompt_scorer
        return scorer is None or scorer.keeps_newest

    @property
    def query_aware(self) -> bool:
        scorer = self.prompt_scorer
        return scorer is not None and scorer.query_aware

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        scorer = self.prompt_scorer
        found = None if scorer is None else scorer.check(model, device)
        return found or self.decode_scorer.check(model, device)

    @classmethod
    def inline_parameters(cls, text: str, given: Mapping[str, object]) -> dict[str, object]:
        return {"target_size": whole_tokens("prefill_decoding", text)}

    def inline_text(self) -> str | None:
        return str(self.target_size)
