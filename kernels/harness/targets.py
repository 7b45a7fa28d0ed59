"""The architectures that kernels are compiled for, and how to compile for one with no GPU."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


@dataclass(frozen=True)
class Architecture:
    """What Triton calls a target, and what one program may use of it.

    Attributes
    ----------
    max_registers : int
        Per thread: 255 in an instruction of CUDA; on CDNA 3 vector and accumulation registers together.
    max_shared_bytes : int
        Per program: CUDA C++ Programming Guide, table of compute capabilities; CDNA 3 ISA guide (LDS).
    """

    gpu_target: GPUTarget
    max_registers: int
    max_shared_bytes: int


ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 255, 163 * 1024),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 255, 227 * 1024),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), 255, 227 * 1024),
    "sm_120": Architecture(GPUTarget("cuda", 120, 32), 255, 99 * 1024),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 512, 64 * 1024),
}


def compile_for(target: str) -> None:
    """Let Triton compile for a target from now on in this process, which then can launch nothing.

    A kernel remembers what it compiled per device, not per target: use a process per target.
    """
    gpu_target = ARCHITECTURES[target].gpu_target
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: gpu_target,
            get_current_device=lambda: 0,
            get_current_stream=lambda _device: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
        )
    )
