"""What a reduction answers: which dimensions or layers of a kept token are stored at all."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvsim.compression.base import LayerView, StrategyPart
from kvsim.specs.base import Dtype
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.compression.codec import ReductionCodec
    from kvsim.ops import OpCall
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec


class Reduction(StrategyPart):
    """Fewer numbers per kept token: channels left out, coordinates in a smaller basis, layers that share.

    An encoding then stores the numbers that remain, so every pair of both is defined.
    """

    @abstractmethod
    def reduced_group(self, group: LayerGroup) -> LayerGroup:
        """Shape of what one layer stores: heads (or groups of heads) and channels per K and V vector."""

    @property
    def is_none(self) -> bool:
        """Whether nothing is left out."""
        return False

    def at_layer(self, layer: LayerView) -> Reduction:
        """Give what the method does in one layer; methods over several layers differ from layer to layer."""
        return self

    @property
    def joins_layers(self) -> bool:
        """Whether a token is stored for several layers at once, so that these must hold the same tokens."""
        return False

    def stored_with(self, layer: LayerView) -> tuple[int, ...]:
        """Indices of the layers whose cache is stored together with this one's, itself among them.

        What they share lies in the first. Rules that keep a layer native keep all of them so.
        """
        return (layer.index,)

    @property
    def depends_on_prompt(self) -> bool:
        """Whether what a token becomes depends on the rest of the prompt, so that no other request can reuse it."""
        return False

    @property
    def is_architecture(self) -> bool:
        """Whether the model must be trained with it, so that KV which another model made cannot be stored so."""
        return self.family == "architecture"

    @property
    def is_replicated(self) -> bool:
        """Whether all heads read the same numbers, so that each tensor-parallel rank holds all of them (MLA)."""
        return False

    @property
    def resident_share(self) -> float:
        """Share of the encoded numbers that this layer holds itself, less than 1 where layers share; they read it all.

        Of those per token as of those that an encoding holds once per sequence.
        """
        return 1.0

    @property
    def residual_share(self) -> float:
        """Share of an encoding's newest native tokens that this layer holds itself."""
        return 1.0

    @property
    def prices_mean_layer(self) -> bool:
        """Whether a layer's bytes are the mean over layers, because calibration decides which of them store."""
        return False

    def metadata_bytes_per_token(self, group: LayerGroup, native: Dtype) -> float:
        """Bytes per token in one layer beside the reduced K and V (magnitudes of merged vectors)."""
        return 0.0

    def fixed_bytes_per_sequence(self, group: LayerGroup, native: Dtype) -> float:
        """Bytes per sequence and layer that do not grow with tokens (a basis found at prefill, a channel mask)."""
        return 0.0

    def append_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        """Work to reduce one new token in one layer; linear in tokens but for ``launches``."""
        return ()

    def prefill_ops(self, prompt_tokens: int, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        """Work once per prompt and layer beyond ``append_ops``: find a basis, score channels, merge layers."""
        return ()

    def decode_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        """Work per decode step, sequence and layer independent of context."""
        return ()

    def attention_flops_per_token(self, group: LayerGroup, model: ModelSpec) -> float:
        """Extra FLOPs per attended token in one layer beyond plain attention (rebuilding keys)."""
        return 0.0

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        """Why this model or device cannot run the method, or None."""
        return None

    @abstractmethod
    def codec(self) -> ReductionCodec:
        """Give the algorithm, as code that runs on tensors."""
