"""What a deployment's prices rest on: the fitted kernels that serve it, and where priors stand in for one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from kvsim.cost.kernels import Kernel, all_reduce_kernel, format_name, kept_by_deployment
from kvsim.cost.linear import linear_kernels
from kvsim.cost.projection import attention_kernels
from kvsim.deployment import Deployment
from kvsim.ops import Component
from kvsim.specs.base import Basis

LINEAR, DECODE, PREFILL, ALL_REDUCE = "linear layers", "decode attention", "prefill attention", "all-reduce"


_RANKS = {basis: rank for rank, basis in enumerate(Basis)}


@dataclass(frozen=True)
class Pricing:
    """What prices one operation of a deployment; ``kernel`` is None for priors."""

    component: Component
    operation: str
    subject: str
    """Format or part of the model that it is about."""
    kernel: Kernel | None
    outside: tuple[str, ...] = ()
    """Columns in which the deployment's shape lies beyond the rows fitted."""


@kept_by_deployment
def pricings(deployment: Deployment) -> tuple[Pricing, ...]:
    """List what prices each operation, once for every distinct answer; nothing where no set is used."""
    if deployment.calibration is None:
        return ()
    attention = (pricing for variant in deployment.variants for pricing in _attention(variant))
    found = (*_linear(deployment), *attention, *_collectives(deployment))
    return tuple(dict.fromkeys(found))


def _linear(deployment: Deployment) -> Iterator[Pricing]:
    model, linear = deployment.model, linear_kernels(deployment)
    yield Pricing(Component.WEIGHTS, LINEAR, f"{model.weight_bits:g}-bit weights", linear.layers)
    if model.moe is not None:
        yield Pricing(Component.WEIGHTS, LINEAR, "grouped products of experts", None)
    yield Pricing(Component.WEIGHTS, LINEAR, "LM head", linear.head)


def _attention(deployment: Deployment) -> Iterator[Pricing]:
    for layer_class, kernels in zip(deployment.layer_classes, attention_kernels(deployment), strict=True):
        subject = f"{format_name(layer_class.encoding)} cache"
        decode = kernels.decode.kernel if kernels.decode else None
        for operation, kernel in ((DECODE, decode), (PREFILL, kernels.prefill or kernels.native_prefill)):
            outside = kernel.outside(**kernels.shape.heads) if kernel and kernels.shape else ()
            yield Pricing(Component.ATTENTION, operation, subject, kernel, outside)
    covered = sum(size for layer_class in deployment.layer_classes for _, size in layer_class.bands)
    if deployment.state_bytes_per_sequence:
        yield Pricing(Component.ATTENTION, DECODE, "recurrent state", None)
    if any(group.shares_kv for group in deployment.model.groups) or not covered:
        yield Pricing(Component.ATTENTION, DECODE, "layers without a cache of their own", None)


def _collectives(deployment: Deployment) -> Iterator[Pricing]:
    if deployment.tensor_parallel_size > 1:
        ranks = f"{deployment.tensor_parallel_size} ranks"
        yield Pricing(Component.COMMUNICATION, ALL_REDUCE, ranks, all_reduce_kernel(deployment))


def component_basis(deployment: Deployment) -> Mapping[Component, Basis]:
    """Basis of each component's time: the least certain among those that price parts of it.

    Launches of elementwise kernels are priors on every device with fitted kernels, and so is what a compression adds.
    Engine-level fits cover all that reads memory and multiplies, launches included, but no link.
    """
    found = dict.fromkeys(Component, Basis.DATASHEET)
    found[Component.COMPRESSION] = Basis.LITERATURE
    if deployment.engine_fit is not None:
        fitted = (Component.WEIGHTS, Component.ATTENTION, Component.OVERHEAD)
        found |= dict.fromkeys(fitted, deployment.engine_fit.basis)
    elif deployment.calibration is not None:
        for component in (Component.WEIGHTS, Component.ATTENTION, Component.COMMUNICATION):
            priced_by = [one.kernel for one in pricings(deployment) if one.component is component]
            found[component] = weakest(kernel.basis if kernel else Basis.DATASHEET for kernel in priced_by or [None])
    return found


def weakest(bases: Iterable[Basis]) -> Basis:
    """The least certain of some bases."""
    return max(bases, key=_RANKS.__getitem__)


def kernel_notes(deployment: Deployment) -> tuple[str, ...]:
    """What a reader must know: operations that no fitted kernel prices, and those that kvsim's own do."""
    return tuple(note for pricing in pricings(deployment) for note in _notes(pricing, deployment.device.name))


def _notes(pricing: Pricing, device: str) -> Iterator[str]:
    missing = f"no production kernel for {_what(pricing)} on {device} is calibrated"
    if pricing.kernel is None:
        yield f"{missing}: priors"
    elif pricing.kernel.artefact.kernel.startswith("kvsim/"):
        yield f"{missing}: kvsim's own {pricing.kernel.artefact.kernel}"
    if pricing.outside:
        yield f"{_what(pricing)}: {', '.join(pricing.outside)} beyond the shapes that its kernel was fitted on"


def _what(pricing: Pricing) -> str:
    return f"{pricing.operation} ({pricing.subject})"
