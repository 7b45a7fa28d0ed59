"""Fitted kernels ready to price with: which of a calibration set serve a deployment, and what one says of a shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from kvsim.compression.base import KvEncoding
from kvsim.compression.strategy import spell
from kvsim.cost.priors import Edge
from kvsim.deployment import Deployment, LayerClass
from kvsim.specs.base import Basis, Dtype
from kvsim.specs.device import DeviceSpec
from kvsim.specs.model import LayerKind

if TYPE_CHECKING:
    from kvsim.calibration.artefact import Artefact, Predictor
    from kvsim.calibration.sets import CalibrationSet

T = TypeVar("T")
FloatArray = npt.NDArray[np.float64]
AUTO = "auto"
DEPLOYMENTS_KEPT = 32
MAX_KEPT = 1024
"""Kernels kept ready; hypothetical devices in tests and sweeps would pile up otherwise."""
ENGINE_KERNELS: Mapping[str, tuple[str, ...]] = {"llamacpp": ("llama.cpp/", "llamacpp/", "kvsim/")}
"""How the names of kernels begin that an engine can run; an engine without an entry runs any."""


class Kernel:
    """An artefact on a device. Compared by identity, so that tables made of it can be kept."""

    def __init__(self, artefact: Artefact, predictor: Predictor) -> None:
        self.artefact = artefact
        self.artefact_id = artefact.id
        self.predictor = predictor

    @property
    def members(self) -> tuple[Kernel, ...]:
        """The fitted kernels that it is made of: itself."""
        return (self,)

    @property
    def source(self) -> str:
        """Kernel, artefact, rows and held-out errors, as explanations name them."""
        one = self.artefact
        errors = [
            f"{name} {held.median_ape:.1%} median, {held.p90_ape:.1%} p90"
            for name, held in one.held_out.items()
            if held.median_ape is not None and held.p90_ape is not None
        ]
        held_out = f"; held out: {'; '.join(errors)}" if errors else ""
        return f"{one.kernel} {one.version} ({self.artefact_id}), {one.basis.value} over {one.rows} rows{held_out}"

    @property
    def framework(self) -> str:
        """Engine or library that it comes from."""
        return self.artefact.kernel.partition("/")[0]

    def outside(self, **given: float) -> tuple[str, ...]:
        """Columns of a shape that lie beyond the rows fitted."""
        domain = self.artefact.domain
        return tuple(
            name for name, value in given.items() if name in domain and not domain[name][0] <= value <= domain[name][1]
        )

    @property
    def basis(self) -> Basis:
        """What the artefact rests on."""
        return self.artefact.basis

    def at_edges(self, shape: Mapping[str, FloatArray]) -> dict[Edge, FloatArray]:
        """Predict rows of `shape` at each edge of the band that the artefact states."""
        seconds = self.predictor.seconds(shape)
        low, high = self.predictor.band(shape)
        return {Edge.CENTRAL: seconds, Edge.OPTIMISTIC: seconds * low, Edge.PESSIMISTIC: seconds * high}


def kept_by_deployment(function: Callable[[Deployment], T]) -> Callable[[Deployment], T]:
    """Keep what a function gave for the last deployments, compared by identity: a report prices one six times."""
    kept: dict[int, tuple[Deployment, T]] = {}

    @wraps(function)
    def looked_up(deployment: Deployment) -> T:
        found = kept.get(id(deployment))
        if found is None or found[0] is not deployment:
            if len(kept) >= DEPLOYMENTS_KEPT:
                kept.clear()
            found = kept[id(deployment)] = (deployment, function(deployment))
        return found[1]

    return looked_up


_READY: dict[tuple[int, int, int], tuple[CalibrationSet, DeviceSpec, Kernel]] = {}
"""Kernels by set, device and artefact; the objects are kept so that their ids stay theirs."""


def find_kernel(
    deployment: Deployment, operation: str, *, dtype: str, kv_dtype: str = "", kernel: str = AUTO
) -> Kernel | None:
    """Give the set's kernel for an operation and format; None without a set, or where it has none."""
    calibration, device = deployment.calibration, deployment.device
    if calibration is None:
        return None
    artefact = calibration.find(device.name, operation, kernel=kernel, dtype=dtype, kv_dtype=kv_dtype)
    return ready_kernel(deployment, artefact) if artefact is not None else None


def ready_kernel(deployment: Deployment, artefact: Artefact) -> Kernel | None:
    """Make an artefact of the deployment's set ready on its device, once; None where its engine cannot run it."""
    calibration, device = deployment.calibration, deployment.device
    if calibration is None or not _runs(deployment, artefact.kernel):
        return None
    key = (id(calibration), id(device), id(artefact))
    if key not in _READY:
        if len(_READY) >= MAX_KEPT:
            _READY.clear()
        _READY[key] = (calibration, device, Kernel(artefact, calibration.predictor(artefact, device)))
    return _READY[key][2]


def _runs(deployment: Deployment, kernel_name: str) -> bool:
    allowed = ENGINE_KERNELS.get(deployment.engine.kind)
    return allowed is None or kernel_name.startswith(allowed)


@dataclass(frozen=True)
class AttentionShape:
    """Heads of one layer on one rank as attention kernels see them."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window_tokens: int
    is_latent: bool

    @property
    def heads(self) -> dict[str, float]:
        """Columns that do not change from step to step."""
        if self.is_latent:
            return {"num_heads": float(self.num_heads)}
        return {
            "num_heads": float(self.num_heads),
            "num_kv_heads": float(self.num_kv_heads),
            "head_dim": float(self.head_dim),
            "window_tokens": float(self.window_tokens),
        }

    def columns(self, **given: FloatArray) -> dict[str, FloatArray]:
        """Columns of a shape with what is given, as predictors want them."""
        rows = len(next(iter(given.values())))
        return {**given, **{name: np.full(rows, value) for name, value in self.heads.items()}}


def attention_shape(deployment: Deployment, layer_class: LayerClass) -> AttentionShape | None:
    """Shape of a layer class; None where no table describes its kind: sparse layers, keys and values of two sizes."""
    group, model = layer_class.group, deployment.model
    heads = model.num_attention_heads // deployment.tensor_parallel_size
    if group.kind is LayerKind.INDEXED:
        return None
    if group.is_latent:
        return AttentionShape(heads, 1, group.k_head_dim, 0, is_latent=True) if model.mla is not None else None
    if group.v_head_dim != group.k_head_dim or layer_class.kv_heads_per_rank < 1:
        return None
    return AttentionShape(heads, layer_class.kv_heads_per_rank, group.k_head_dim, group.window_tokens or 0, False)


def attention_kernel(
    deployment: Deployment, operation: str, layer_class: LayerClass, *, native: bool = False
) -> Kernel | None:
    """Kernel of ``decode`` or ``prefill`` attention over a layer class's cache, or over one in the model's dtype."""
    shape = attention_shape(deployment, layer_class)
    if shape is None:
        return None
    name = f"mla_{operation}" if shape.is_latent else f"{operation}_attention"
    for kernel in dict.fromkeys((deployment.engine.attention_kernel, AUTO)):
        for dtype, kv_dtype in _kv_formats(deployment, layer_class, native=native):
            found = find_kernel(deployment, name, dtype=dtype, kv_dtype=kv_dtype, kernel=kernel)
            if found is not None:
                return found
    return None


def _kv_formats(deployment: Deployment, layer_class: LayerClass, *, native: bool) -> Iterable[tuple[str, str]]:
    """(multiplied in, stored as) of a cache in tables of kernels, the closest first."""
    model, encoding = deployment.model, layer_class.encoding
    half = ("bf16", "fp16") if model.dtype is Dtype.BF16 else ("fp16", "bf16")
    if native or encoding.kind == "native":
        # Kernels of both 16-bit formats move and multiply alike.
        return [(name, name) for name in half] if model.dtype in (Dtype.BF16, Dtype.FP16) else ()
    if encoding.kind == "fp8":
        return [(dtype, "fp8") for dtype in (*half, "fp8")]
    return [(half[0], name) for name in dict.fromkeys((format_name(encoding), encoding.unpack_family)) if name]


@lru_cache(maxsize=64)
def format_name(encoding: KvEncoding) -> str:
    """Name of a format in timings and in notes: the strategy's."""
    return spell(encoding)


def all_reduce_kernel(deployment: Deployment) -> Kernel | None:
    """Kernel of the all-reduce over the deployment's ranks; None for more ranks than were measured."""
    ranks = deployment.tensor_parallel_size
    if ranks == 1:
        return None
    for dtype in ("bf16", "fp16"):
        found = find_kernel(deployment, "all_reduce", dtype=dtype)
        if found is not None:
            low, high = found.artefact.domain["ranks"]
            return found if low <= ranks <= high else None
    return None
