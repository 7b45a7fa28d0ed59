"""What a reduction answers: which dimensions or layers of a kept token are stored at all."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from kvsim.compression.base import LayerView, StoringPart
from kvsim.specs.base import Dtype
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.compression.codec import ReductionCodec


class Reduction(StoringPart):
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

    def stored_with(self, layer: LayerView) -> tuple[int, ...]:
        """Indices of the layers whose cache is stored together with this one's, itself among them.

        What they share lies in the first. Rules that keep a layer native keep all of them so.
        """
        return (layer.index,)

    @property
    def is_architecture(self) -> bool:
        """Whether the model must be trained with it, so that KV which another model made cannot be stored so."""
        return self.family == "architecture"

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

    @abstractmethod
    def codec(self) -> ReductionCodec:
        """Give the algorithm, as code that runs on tensors."""
