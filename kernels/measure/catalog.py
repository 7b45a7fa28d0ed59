"""Load variants one kernel at a time, so that one that cannot be imported does not lose the rest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from .. import KERNELS
from ..contract import Variant

_PACKAGE = __name__.removesuffix(".measure.catalog")
CPU_CASES = 2


@dataclass(frozen=True)
class Catalog:
    """Variants by name, and the hash of the source of each."""

    variants: dict[str, Variant]
    sources: dict[str, str]


def load(prefixes: Sequence[str], on_failure: Callable[[str, Exception], None]) -> Catalog:
    """Load the variants whose name starts with one of `prefixes` (all for none); hand failures to `on_failure`."""
    variants: dict[str, Variant] = {}
    sources: dict[str, str] = {}
    folders = tuple(prefix.partition("/")[0] for prefix in prefixes)
    for kernel in KERNELS:
        # The first part of an operation's name is the kernel's first folder.
        if folders and not kernel.startswith(folders):
            continue
        try:
            found = import_module(f"{_PACKAGE}.{kernel}.cases").VARIANTS
            source = _source_sha256(kernel)
        except Exception as error:
            on_failure(kernel, error)
            continue
        for variant in found:
            if not prefixes or variant.name.startswith(tuple(prefixes)):
                if variant.name in variants:
                    on_failure(variant.name, ValueError("two variants have this name; the second is left out"))
                    continue
                variants[variant.name], sources[variant.name] = variant, source
    return Catalog(variants, sources)


def _source_sha256(kernel: str) -> str:
    from ..harness.source_hash import source_sha256

    return source_sha256(kernel)


def cases_on(device: str) -> Callable[[Variant], Sequence[Any]]:
    """Give what to time on a device: the timing cases on a GPU, the first tiny ones in the interpreter."""
    if device == "cuda":
        return lambda variant: variant.timing_cases
    return lambda variant: variant.correctness_cases[:CPU_CASES]
