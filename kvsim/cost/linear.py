"""Fitted kernels of a model's linear layers, by the format of their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvsim.cost.fused_input import with_fused_input
from kvsim.cost.kernels import Kernel, find_kernel, kept_by_deployment, ready_kernel
from kvsim.cost.mean_kernel import mean_of
from kvsim.cost.shapes import Gemm
from kvsim.deployment import Deployment
from kvsim.specs.base import Dtype

GEMM: Final = "gemm"
FUSED: Final = "fp8"
"""Format of layers whose input other kernels can quantise: one scale for the whole tensor, known beforehand."""
ROUTER: Final = "router"
"""Name of the routing layer in ``cost/shapes``."""
SAME_CALL: Final = ("bf16", "fp16")
"""Formats whose product is one cuBLAS call in every engine; for others each engine has kernels of its own."""


def gemm_kernel(deployment: Deployment, *, weight_bits: float, weight_dtype: Dtype, compute: Dtype) -> Kernel | None:
    """Kernel of linear layers with weights of that format; None where the set has none for the pair of formats."""
    for name in _gemm_formats(weight_bits, weight_dtype, compute):
        found = find_kernel(deployment, GEMM, dtype=name)
        if found is not None:
            return _mean(deployment, found, name) if name in SAME_CALL else found
    return None


def _mean(deployment: Deployment, default: Kernel, dtype: str) -> Kernel:
    """The default kernel together with the newest of every other engine's collection of the same call."""
    calibration = deployment.calibration
    if calibration is None:
        return default
    found = calibration.newest_of_engines(deployment.device.name, GEMM, dtype=dtype)
    ready = [kernel for one in found if (kernel := ready_kernel(deployment, one)) is not None]
    if default.framework not in {kernel.framework for kernel in ready}:
        return default
    others = tuple(kernel for kernel in ready if kernel.framework != default.framework)
    return mean_of((default, *others)) if others else default


@dataclass(frozen=True)
class LinearKernels:
    """Fitted kernels of a model's linear layers and of its LM head, which stays in bf16."""

    layers: Kernel | None
    head: Kernel | None

    def of(self, gemm: Gemm) -> Kernel | None:
        """Kernel of one linear layer; experts have none: no table describes grouped products.

        Routers are left in 16 bits by the formats that quantise the layers.
        """
        if gemm.num_experts:
            return None
        return self.head if gemm.name == ROUTER else self.layers


@kept_by_deployment
def linear_kernels(deployment: Deployment) -> LinearKernels:
    """Find the kernels of a deployment's linear layers."""
    model, device = deployment.model, deployment.device
    compute = model.weight_dtype if device.supports(model.weight_dtype) else Dtype.BF16
    layers = gemm_kernel(deployment, weight_bits=model.weight_bits, weight_dtype=model.weight_dtype, compute=compute)
    plain = gemm_kernel(deployment, weight_bits=16.0, weight_dtype=Dtype.BF16, compute=Dtype.BF16)
    if deployment.engine.fused_input_quantization and layers and plain and layers.artefact.dtype == FUSED:
        return LinearKernels(with_fused_input(layers, plain), plain)
    return LinearKernels(layers, plain)


def _gemm_formats(weight_bits: float, weight_dtype: Dtype, compute: Dtype) -> tuple[str, ...]:
    """Names of a format in GEMM tables, the closest first; scales may add a little to the bits."""
    half = (Dtype.BF16, Dtype.FP16)
    if weight_dtype in half and weight_bits == 16.0:
        return ("bf16", "fp16") if weight_dtype is Dtype.BF16 else ("fp16", "bf16")
    if weight_dtype is Dtype.FP8 and compute is Dtype.FP8 and 8.0 <= weight_bits < 9.0:
        return ("fp8", "fp8_block")
    if weight_dtype is Dtype.FP4 and compute is Dtype.FP4 and 4.0 <= weight_bits < 5.0:
        return ("nvfp4",)
    if weight_dtype is Dtype.INT8 and 8.0 <= weight_bits < 9.0:
        return ("int8", "sq") if compute is Dtype.INT8 else ("int8_wo",)
    if weight_dtype is Dtype.INT4 and 4.0 <= weight_bits < 5.0:
        return ("int4_wo",)
    return ()
