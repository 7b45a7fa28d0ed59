"""One kernel launch as a value, so that the same argument list can be run on a GPU or compiled without one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is tiled and pipelined; a timing means nothing without it and the triton version.

    Attributes
    ----------
    block_n : int
        Cached tokens per tile, a power of two of at least 16.
    num_warps, num_stages : int
        Warps per program, and Triton's pipeline depth: ``num_stages - 1`` tiles are in flight.
    """

    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Launch:
    """A Triton kernel with its grid, its run-time arguments in order, and its constants and options by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Sequence[Any]
    options: Mapping[str, Any]

    def run(self) -> None:
        """Launch on the current device (or in Triton's interpreter)."""
        self.kernel[self.grid](*self.arguments, **self.options)

    def compile(self) -> Any:
        """Compile for the active driver's target, launching nothing; return Triton's compiled kernel."""
        return self.kernel.warmup(*self.arguments, grid=self.grid, **self.options)


@dataclass(frozen=True)
class HostCall:
    """Work that is no Triton kernel, such as a library's matrix product or a copy over the host link.

    It stands in a plan where a `Launch` stands; there is nothing to compile, so compile probes pass it over.

    Attributes
    ----------
    name : str
        What a timing is listed under, as a kernel's name is.
    function : callable
        Enqueues the work on the current stream; work on other streams must be joined to it.
    """

    name: str
    function: Callable[[], object]

    def run(self) -> None:
        """Enqueue on the current device."""
        self.function()
