"""What the parts of a strategy are made of, and how a kept token is stored.

A strategy is a frozen value: parameters in, numbers out. Token counts over the life of a sequence are piecewise
linear in the number of generated tokens, which is what lets the simulator add up decode steps in closed form.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvsim.errors import InvalidSpec, NotRunnable
from kvsim.specs.base import DTYPE_BITS, Dtype, Spec
from kvsim.specs.model import LayerGroup
from kvsim.specs.prior import Prior

if TYPE_CHECKING:
    from kvsim.compression.codec import Codec
    from kvsim.ops import OpCall
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec


@dataclass(frozen=True, slots=True)
class TokenCurve:
    """Tokens as a piecewise linear function of generated tokens ``g``: segments (start_g, value, slope).

    Segments start at g = 0 and ascend; each holds until the next one starts. Values are integers >= 0. With a
    ``period`` what lies in [``repeats_from``, ``repeats_from`` + ``period``) comes again and again, so that a cache
    that is cut back every so many tokens is exact for ever; ``repeats_from`` is the start of a segment.
    """

    segments: tuple[tuple[int, int, int], ...]
    repeats_from: int = 0
    period: int = 0

    def __call__(self, generated_tokens: int) -> int:
        """Tokens after ``generated_tokens`` decode steps."""
        start, value, slope = self.segment_at(generated_tokens)
        return value + slope * (generated_tokens - start)

    def segment_at(self, generated_tokens: int) -> tuple[int, int, int]:
        """Give the segment that holds after ``generated_tokens``."""
        shift = self._shift(generated_tokens)
        found = self.segments[0]
        for segment in self.segments[1:]:
            if segment[0] > generated_tokens - shift:
                break
            found = segment
        return found[0] + shift, found[1], found[2]

    def next_breakpoint(self, after: int) -> int | None:
        """Next number of generated tokens at which another segment starts, or None."""
        shift = self._shift(after)
        later = (start + shift for start, _, _ in self.segments if start + shift > after)
        return next(later, self.repeats_from + self.period + shift if self.period else None)

    def _shift(self, generated_tokens: int) -> int:
        """Whole periods before ``generated_tokens``."""
        since = generated_tokens - self.repeats_from
        return since - since % self.period if self.period and since > 0 else 0


def growing(start_tokens: int, cap_tokens: int | None = None) -> TokenCurve:
    """Tokens that start at ``start_tokens``, gain one per step, and stop at ``cap_tokens``."""
    if cap_tokens is None:
        return TokenCurve(((0, start_tokens, 1),))
    if start_tokens >= cap_tokens:
        return TokenCurve(((0, cap_tokens, 0),))
    return TokenCurve(((0, start_tokens, 1), (cap_tokens - start_tokens, cap_tokens, 0)))


@dataclass(frozen=True, slots=True)
class HeadCurves:
    """KV heads of a layer that hold and read equally many tokens.

    Kinds of heads have whole numbers of tokens each, where the mean over a layer would grow by less than one a step.
    """

    share: float
    """Of the layer's KV heads; on average over the layers of a band where they differ."""
    resident: TokenCurve
    attended: TokenCurve


@dataclass(frozen=True, slots=True)
class LayerView:
    """One layer as a selection sees it."""

    index: int
    num_layers: int
    group: LayerGroup


@dataclass(frozen=True, slots=True)
class KvBytes:
    """Bytes of one kept token in one layer (all KV heads): codes, and everything else that travels with them."""

    payload_bytes: float
    metadata_bytes: float = 0.0

    @property
    def total_bytes(self) -> float:
        """Payload and metadata together."""
        return self.payload_bytes + self.metadata_bytes


class StrategyPart(Spec):
    """One part of a strategy, and how the field spells it."""

    names: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    """Published name -> the parameters that it stands for; anything else keeps the field's default."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Other spelling -> one of ``names``, with ``:value`` behind it where it stands for one."""
    spellings: ClassVar[tuple[str, ...]] = ()
    """Canonical spellings beside ``names`` that listings and laws include: a name with a value."""
    summaries: ClassVar[Mapping[str, str]] = {}
    """One of ``names`` -> one line with the paper or the engine that defines it."""
    inline_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that ``name:value`` sets."""
    family: ClassVar[str] = ""
    """What kind of method it is, in the words of docs/methods.md."""
    masked_in: ClassVar[str | None] = None
    """Public code that merely masks what the method drops, so that it frees no memory, with its files; or None."""
    freed_in: ClassVar[str | None] = None
    """Public code that frees the memory, where other code masks."""

    kind: str

    @classmethod
    def inline_parameters(cls, text: str, given: Mapping[str, object]) -> dict[str, object]:
        """Parameters that ``name:text`` stands for, beside those ``given`` by name; raise InvalidSpec for none."""
        msg = f"{next(iter(cls.names))!r} takes no value after ':' (got {text!r})"
        raise InvalidSpec(msg)

    def inline_text(self) -> str | None:
        """Give what follows ``name:`` for these parameters, or None where they need their names."""
        return None

    def spelled(self) -> str | None:
        """Give the whole spelling of a part that is no name with parameters (a list over layers), or None."""
        return None

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        """Why this model or device cannot run the method, or None."""
        return None


class StoringPart(StrategyPart):
    """What reductions and encodings have in common: both change what a token is stored as."""

    def fixed_bytes_per_sequence(self, group: LayerGroup, native: Dtype) -> float:
        """Bytes per sequence and layer that do not grow with tokens (a basis found at prefill, a channel mask)."""
        return 0.0

    @property
    def depends_on_prompt(self) -> bool:
        """Whether what a token becomes depends on the rest of the prompt, so that no other request can reuse it."""
        return False

    @property
    def joins_layers(self) -> bool:
        """Whether numbers of several layers (kvtc: and heads) are stored together, so that all must hold the token."""
        return False

    @property
    def is_replicated(self) -> bool:
        """Whether all heads read the same numbers, so that each tensor-parallel rank holds all of them (MLA)."""
        return False

    def append_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        """Work to store one new token in one layer: quantise, rotate, project. Charged in prefill and decode.

        Everything but ``launches`` is linear in tokens, so n tokens are n times this work in one launch.
        """
        return ()

    def prefill_ops(self, prompt_tokens: int, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        """Work once per prompt and layer beyond ``append_ops``: find a basis, score channels, merge layers."""
        return ()

    def decode_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        """Work per decode step, sequence and layer independent of context (rotate the query, un-rotate output)."""
        return ()

    def attention_flops_per_token(self, group: LayerGroup, model: ModelSpec) -> float:
        """Extra FLOPs per attended token in one layer beyond plain attention (rebuilding keys)."""
        return 0.0


class KvEncoding(StoringPart):
    """How a kept token is stored, read and written.

    Linear-attention layers keep no tokens: every encoding leaves them alone and gives 0 bytes and no work. Keys of a
    sparse-attention indexer live in their own cache in a fixed format and are not the encoding's either.
    """

    def at_layer(self, layer: LayerView) -> KvEncoding:
        """Give what it does in one layer, where layers differ."""
        return self

    @abstractmethod
    def bytes_per_token(self, group: LayerGroup, native: Dtype) -> KvBytes:
        """Exact bytes of one encoded token in one layer, all KV heads, metadata included."""

    def read_bytes_per_token(self, group: LayerGroup, native: Dtype) -> float:
        """Bytes that one decode step reads per attended token in one layer: what is stored, unless layers share it."""
        return self.bytes_per_token(group, native).total_bytes

    def stored_elements_per_token(self, group: LayerGroup) -> int:
        """Numbers that reading one token in one layer must unpack."""
        return group.kv_elements_per_token

    @property
    def residual_tokens(self) -> int:
        """Newest tokens kept in the native dtype before they are encoded (KIVI's R), 0 if none."""
        return 0

    @property
    def residual_share(self) -> float:
        """Share of those newest tokens that a layer holds itself, less than 1 where layers share a cache."""
        return 1.0

    @property
    def sink_tokens(self) -> int:
        """Tokens that the method itself picks and keeps in the native dtype (attention sinks), 0 if none.

        Which they are is bookkeeping of the engine, as block tables are, and not counted.
        """
        return 0

    def sink_bytes_per_token(self, group: LayerGroup, native: Dtype) -> float:
        """Bytes of one of those tokens in one layer: what the encoding is given to store, uncoded."""
        return group.kv_elements_per_token * DTYPE_BITS[native] / 8

    @property
    def native_tokens(self) -> int:
        """Tokens in the native dtype of a sequence that is long enough, whatever the reason."""
        return self.residual_tokens + self.sink_tokens

    @property
    def evicts(self) -> bool:
        """Whether it gives some tokens no bits at all, so that they leave memory for good."""
        return False

    @property
    def stores_prompt_once(self) -> bool:
        """Whether it stores a prompt when it ends, native until then, and leaves later tokens native.

        Layers with a window lose their prompt as they move on, and stay native.
        """
        return False

    @property
    def undoes_rope(self) -> bool:
        """Whether keys are stored as they are before RoPE, which needs the channels that RoPE turned."""
        return False

    @property
    def skips_boundary_layers(self) -> int:
        """How many first and how many last layers stay native on dense models (vLLM's TurboQuant: 2)."""
        return 0

    @property
    def is_native(self) -> bool:
        """Whether the encoding leaves KV as the model made it."""
        return False

    @property
    def unpack_family(self) -> str | None:
        """Name of the unpack-rate prior in ``calibration/priors`` that bounds reading, or None if no work."""
        return None

    def attention_dtype(self, model: ModelSpec, device: DeviceSpec) -> Dtype:
        """Dtype in which attention multiplies Q, K and V: the model's, unless the format computes natively."""
        return model.dtype

    @property
    def is_storage_only(self) -> bool:
        """Whether attention cannot read the format, so that it serves tiers and transfers but not the device's pool."""
        return False

    @property
    def is_exact(self) -> bool:
        """Whether KV comes back bit for bit."""
        return self.is_native

    @property
    def rate(self) -> Prior | None:
        """Expected size as a share of that without coding, where it depends on the data; None where bytes are exact."""
        return None

    @property
    def unpriced_coder(self) -> str | None:
        """Name of the coder whose speed no prior gives, so that a tier must state it, or None."""
        return None

    def refuses(self, reduction: StrategyPart) -> str | None:
        """Why this encoding cannot follow ``reduction``, or None."""
        return None

    def codec(self) -> Codec:
        """Give the algorithm, as code that runs on tensors.

        Raises
        ------
        NotRunnable
            It has no algorithm of its own (several parts together), or one that must be trained into a model.
        """
        raise NotRunnable(self.kind)
