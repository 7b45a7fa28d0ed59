"""What every kernel folder offers, so that one harness checks, compiles, times and lists them all.

A folder's ``cases.py`` ends in ``VARIANTS``, a tuple of `Variant`. A variant is one way to run one operation: a KV
format, and a form (``best``: the fastest we know; ``as_shipped``: the shape of the code that serving engines run
today). Shapes are cases, frozen values of the folder's own making with a ``name``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .launches import HostCall, Launch, LaunchConfig

if TYPE_CHECKING:
    import torch

    from .formats.base import KvFormat

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
"""Architectures that kernels are compiled for: A100, H100/H200, B200, RTX Pro 6000, MI300X."""

Form = Literal["best", "as_shipped"]
Comparison = Literal["close", "codes", "exact"]


class Case(Protocol):
    """One shape of an operation."""

    @property
    def name(self) -> str:
        """Unique within the variant."""


@dataclass(frozen=True)
class Traffic:
    """What an operation must move and compute at least, whatever the kernel: the yardstick of a timing.

    Attributes
    ----------
    read_bytes, written_bytes : int
        Each input byte once, each output byte once; scratch is not counted.
    flops : int
        Floating-point operations of the maths, 2 per multiply-add; unpacking is not counted.
    units : int
        How many of the variant's `cost_unit` the case holds.
    """

    read_bytes: int
    written_bytes: int
    flops: int
    units: int


@dataclass(frozen=True)
class CountedLoop:
    """Which machine code to count instructions in, and how much work one pass over it does.

    Attributes
    ----------
    kernel : str
        Name of the jitted function.
    body : {'matrix_loop', 'largest_loop', 'whole'}
        The innermost loop that holds a matrix instruction (the largest such if several), the largest loop, or the
        whole program.
    units : float
        Cost units that one program does in one pass.
    """

    kernel: str
    body: Literal["matrix_loop", "largest_loop", "whole"]
    units: float


class Variant(ABC):
    """One way to run one operation.

    Attributes
    ----------
    operation : str
        The first folder below ``kernels``, and the second where the first holds several operations, such as
        ``decode_attention`` or ``score/snapkv``.
    kv_format : KvFormat or None
        How K and V are stored, None where the operation sees no stored KV.
    form : {'best', 'as_shipped'}
    cost_unit : str
        What compiled clocks are counted per, such as ``token_kv_head``.
    correctness_cases, timing_cases : tuple of Case
        Small and odd on purpose; and real, in the order of the time they take.
    compile_case : Case
        Small, with the tile-relevant dimensions of Llama-3.1-8B (or of the model the format is for).
    uses_matrix_units : bool
        Whether the counted kernel must contain a matrix instruction.
    """

    operation: str
    kv_format: "KvFormat | None" = None
    form: Form = "best"
    cost_unit: str
    correctness_cases: tuple[Any, ...]
    timing_cases: tuple[Any, ...]
    compile_case: Any
    uses_matrix_units: bool = False

    @property
    def name(self) -> str:
        """Give the name under which results are stored, such as ``decode_attention/fp8_e4m3/best``."""
        middle = (self.kv_format.name,) if self.kv_format else ()
        return "/".join((self.operation, *middle, self.form))

    @abstractmethod
    def make_inputs(self, case: Any, *, seed: int, device: str) -> dict[str, Any]:
        """Draw fresh random inputs on a device; rows that hold no token are NaN (floats) or random (codes)."""

    @abstractmethod
    def reference(self, case: Any, inputs: Mapping[str, Any]) -> dict[str, "torch.Tensor"]:
        """Compute the results in plain torch, in fp32, by name."""

    @abstractmethod
    def allocate(self, case: Any, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, "torch.Tensor"]:
        """Give the tensors that the launches write, by name: results (the names of `reference`) and scratch.

        Uninitialised by `torch.empty`, or a clone of an input where the operation changes only part of it.
        """

    @abstractmethod
    def plan(
        self, case: Any, inputs: Mapping[str, Any], buffers: Mapping[str, "torch.Tensor"], config: LaunchConfig
    ) -> tuple[Launch | HostCall, ...]:
        """Lay out the launches that fill the buffers; raise ValueError where shapes, dtypes or strides do not fit."""

    @abstractmethod
    def configs(self, target: str, case: Any) -> tuple[LaunchConfig, ...]:
        """Tilings worth compiling and timing on one of `TARGETS`, the default first."""

    @abstractmethod
    def counted_loop(self, case: Any, config: LaunchConfig) -> CountedLoop:
        """Name the code whose instructions are the kernel's cost."""

    @abstractmethod
    def traffic(self, case: Any) -> Traffic:
        """Give the least bytes and operations of a case."""

    def compute_dtype(self, case: Any) -> str:
        """Dtype whose rounding limits agreement with the reference: 'float32', 'float16', 'bfloat16', 'fp8'."""
        return str(case.dtype)

    def comparison(self, result: str) -> Comparison:
        """How a result is compared: 'close' by the tolerance of the dtype; 'codes' byte for byte, few may differ."""
        return "close"

    def unsupported(self, target: str) -> str | None:
        """Why the variant cannot run on a target, as a fragment of the compiler's message or our own, or None."""
        return None
