"""Every variant of every kernel."""

from importlib import import_module

from .. import KERNELS
from ..contract import Variant

_PACKAGE = __name__.removesuffix(".harness.catalog")


def all_variants(prefix: str = "") -> tuple[Variant, ...]:
    """Load the variants whose name starts with `prefix`, in the order of `KERNELS`."""
    return tuple(
        variant
        for kernel in KERNELS
        for variant in import_module(f"{_PACKAGE}.{kernel}.cases").VARIANTS
        if variant.name.startswith(prefix)
    )
