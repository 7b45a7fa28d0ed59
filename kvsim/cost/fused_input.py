"""FP8 linear layers whose input arrives in 8 bits, because the kernel before them wrote it so.

Tables time a layer as an engine calls it on a 16-bit input: quantise the input, then multiply. Engines can leave the
first part to the norm, activation, attention or all-reduce before the layer. It takes what the layer's smallest shape
takes longer than the same in 16 bits, where neither has work to speak of; more with more rows, which stays in.
Sources: vLLM ``PassConfig`` (norm, activation, attention and all-reduce fusions); TensorRT-LLM ``modeling_llama.py``
(``RESIDUAL_RMS_NORM_QUANT_FP8``) and ``gated_mlp.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from kvsim.cost.kernels import FloatArray, Kernel
from kvsim.cost.priors import Edge


class FusedInputKernel(Kernel):
    """A linear layer without the quantisation of its input, never faster than the 16-bit floor."""

    def __init__(self, layer: Kernel, plain: Kernel) -> None:
        super().__init__(layer.artefact, layer.predictor)
        self._layer, self._plain = layer, plain
        lows = {name: max(one.artefact.domain[name][0] for one in (layer, plain)) for name in ("m", "n", "k")}
        self._smallest = {name: np.array([low]) for name, low in lows.items()}

    @property
    def source(self) -> str:
        """The layer's, and what was taken off."""
        return f"{self._layer.source}; less {self.quantisation_s * 1e6:.1f} us of quantising the input"

    @property
    def quantisation_s(self) -> float:
        """Time of quantising an input."""
        layer, plain = (float(one.at_edges(self._smallest)[Edge.CENTRAL][0]) for one in (self._layer, self._plain))
        return max(0.0, layer - plain)

    def at_edges(self, shape: Mapping[str, FloatArray]) -> dict[Edge, FloatArray]:
        """The layer's times less the quantisation."""
        floors = self._plain.at_edges(self._smallest)
        return {
            edge: np.maximum(seconds - self.quantisation_s, np.minimum(seconds, floors[edge][0]))
            for edge, seconds in self._layer.at_edges(shape).items()
        }


@lru_cache(maxsize=64)
def with_fused_input(layer: Kernel, plain: Kernel) -> FusedInputKernel:
    """Take the quantisation off a layer, the same object for the same kernels, so that tables of it can be kept."""
    return FusedInputKernel(layer, plain)
