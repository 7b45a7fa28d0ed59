"""Compile the decode attention launches for one target with no GPU; print what the machine code uses, as JSON.

Run in a process of its own: an unsupported instruction can kill the compiler. Usage: compile_probe.py TARGET
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels.decode_attention.kernel import default_config, plan_decode_attention

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHAPES = [
    (dtype, heads, kv_heads, head_dim)
    for dtype, heads, kv_heads, head_dim in (
        ("bfloat16", 32, 8, 128),
        ("float16", 32, 8, 128),
        ("bfloat16", 64, 8, 64),
        ("bfloat16", 32, 16, 256),
        ("bfloat16", 32, 32, 96),
    )
]


class TargetOnlyDriver:
    """Just enough of a driver to compile: it names the target and has no device."""

    def __init__(self, target):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda _device: 0
        self.get_active_torch_device = lambda: torch.device("cpu")


def resources(compiled):
    """Read registers, spills and shared memory from the machine code."""
    found = {"shared_bytes": compiled.metadata.shared}
    if "cubin" in compiled.asm:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        cubin = Path(triton.knobs.cache.dir) / f"{compiled.hash}.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        listing = subprocess.run(
            [tool, "-res-usage", cubin], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", listing))
        found |= {
            "registers": int(usage["REG"]),
            "spill_bytes": int(usage["STACK"]) + int(usage["LOCAL"]),
            "has_mma": bool(re.search(r"mma\.sync|wgmma|tcgen05\.mma", compiled.asm["ptx"])),
        }
        buffers = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", compiled.asm["ttgir"])
        found["kv_buffers"] = [int(count) for count in buffers]
    else:
        text = compiled.asm["amdgcn"]
        found |= {
            "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", text).group(1)),
            "spill_bytes": 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text).group(1)),
            "has_mma": "v_mfma" in text,
        }
    return found


def probe(target_name):
    """Compile each shape's two launches for a target; return a row per kernel."""
    target = TARGETS[target_name]
    driver.set_active(TargetOnlyDriver(target))
    rows = []
    for dtype, heads, kv_heads, head_dim in SHAPES:
        query = torch.empty(2, heads, head_dim, dtype=getattr(torch, dtype))
        cache = torch.empty(4, 16, kv_heads, head_dim, dtype=query.dtype)
        table, lens = torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        partial, lse = torch.empty(2, heads, 8, head_dim), torch.empty(2, heads, 8)
        config = default_config(target.backend, head_dim)
        launches = plan_decode_attention(
            query, cache, cache, table, lens, torch.empty_like(query), partial, lse, scale=head_dim**-0.5, config=config
        )
        rows.extend(
            {"kernel": launch.kernel.__name__, "shape": [dtype, heads, kv_heads, head_dim], "stages": config.num_stages}
            | resources(launch.compile())
            for launch in launches
        )
    return rows


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe(sys.argv[1])))
