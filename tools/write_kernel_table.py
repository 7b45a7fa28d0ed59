"""Write the generated tables of docs/kernels.md: compiled clocks of decode attention against each GPU's HBM budget.

Run ``python tools/write_kernel_table.py`` after calibration/compiled or a device's bandwidth has changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvsim.device_catalog import load_device
from kvsim.documents import write_atomic
from kvsim.kernel_catalog import CompiledKernel, load_compiled_kernels

CHECKOUT = Path(__file__).resolve().parents[1]
PAGE = CHECKOUT / "docs" / "kernels.md"
TABLES = re.compile(r"(<!-- tables: begin.*? -->\n).*?(<!-- tables: end -->)", re.DOTALL)
BASELINE = "decode_attention/native/best"


@dataclass(frozen=True)
class Gpu:
    """A GPU whose target kernels are compiled for.

    `clock_hz` is a sustained clock of the multiprocessors; `num_multiprocessors` stands here only where the device's
    spec has none. Both are those of the earlier count (see docs/kernels.md), or the spec's.
    """

    name: str
    device: str
    target: str
    clock_hz: float
    num_multiprocessors: int | None = None

    def bytes_per_clock(self) -> float:
        """Bytes that HBM delivers per clock of one multiprocessor."""
        spec = load_device(self.device).spec
        count = spec.num_compute_units.value if spec.num_compute_units else self.num_multiprocessors
        if not count:
            msg = f"{self.device}: the number of multiprocessors is not known"
            raise ValueError(msg)
        return spec.bandwidth_bytes_per_s / count / self.clock_hz


GPUS = (
    Gpu("A100", "a100-sxm-80gb", "sm_80", 1.41e9),
    Gpu("H100", "h100-sxm", "sm_90", 1.755e9),
    Gpu("H200", "h200-sxm", "sm_90", 1.755e9),
    Gpu("B200", "b200-sxm", "sm_100", 1.85e9, num_multiprocessors=148),
    Gpu("RTX Pro 6000", "rtx-pro-6000", "sm_120", 2.4e9),
    Gpu("MI300X", "mi300x", "gfx942", 2.1e9),
)
EARLIER = {
    "decode_attention/fp8/best": {"H100": 1.94, "H200": 1.94, "B200": 1.62},
    "decode_attention/fp8/as_shipped": {"H100": 1.42, "H200": 0.99, "B200": 0.70},
    "decode_attention/int8_per_token_head/best": {"A100": 1.94, "H100": 1.94, "H200": 1.70, "B200": 1.24},
    "decode_attention/int4_per_token_head/best": {"A100": 3.09, "H100": 2.85, "H200": 1.99, "B200": 1.42},
    "decode_attention/kivi-2/best": {"A100": 3.27, "H100": 2.96, "H200": 2.06, "B200": 1.47},
    "decode_attention/turboquant_4bit_nc/best": {"A100": 2.47, "H100": 2.28, "H200": 1.59, "B200": 1.15},
    "decode_attention/turboquant_4bit_nc_lut/best": {"A100": 1.94, "H100": 1.80, "H200": 1.26, "B200": 0.89},
}
"""Best-case speed-up over bf16 that an earlier count found for the nearest kernel that it had."""


def decode_kernels(kernels: Sequence[CompiledKernel]) -> list[CompiledKernel]:
    """Give the decode attention variants over whole contexts of the baseline's heads, the largest format first."""
    (shape,) = (kernel.compile_case for kernel in kernels if kernel.variant == BASELINE)
    chosen = [kernel for kernel in kernels if kernel.operation == "decode_attention" and kernel.compile_case == shape]
    return sorted(chosen, key=lambda kernel: (-kernel.read_bytes_per_unit, kernel.form, kernel.variant))


def shown_name(kernel: CompiledKernel) -> str:
    """Name a row: the format, and the form where it is not the best one."""
    return f"{kernel.kv_format}" + ("" if kernel.form == "best" else ", as shipped")


def clocks(kernel: CompiledKernel, target: str) -> float | None:
    """Give the clocks of a kernel's busiest pipe, None where the target cannot run it."""
    compiled = kernel.targets.get(target)
    return compiled.count.busiest_clocks if compiled and compiled.count else None


def speed_up(kernel: CompiledKernel, baseline: CompiledKernel, gpu: Gpu) -> float | None:
    """Give the best-case speed-up over the baseline: the slower of HBM and the busiest pipe, of both."""
    ours, theirs = clocks(kernel, gpu.target), clocks(baseline, gpu.target)
    if ours is None or theirs is None:
        return None
    rate = gpu.bytes_per_clock()
    return max(baseline.read_bytes_per_unit / rate, theirs) / max(kernel.read_bytes_per_unit / rate, ours)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Give the lines of a Markdown table, numbers to the right."""
    yield "| " + " | ".join(header) + " |"
    yield "|---" + "|---:" * (len(header) - 1) + "|"
    yield from ("| " + " | ".join(row) + " |" for row in rows)


def tables(kernels: Sequence[CompiledKernel]) -> str:
    """Give the generated part of the page."""
    rows = decode_kernels(kernels)
    (baseline,) = (kernel for kernel in rows if kernel.variant == BASELINE)
    targets = tuple(dict.fromkeys(gpu.target for gpu in GPUS))
    lines = ["**Clocks per token and KV head that HBM takes (budget), per multiprocessor**", ""]
    budgets = {
        shown_name(kernel): [f"{kernel.read_bytes_per_unit / gpu.bytes_per_clock():.3g}" for gpu in GPUS]
        for kernel in rows
        if kernel.form == "best"
    }
    sizes = {shown_name(kernel): f"{kernel.read_bytes_per_unit:.4g}" for kernel in rows}
    lines += table(
        ("format", "bytes", *(gpu.name for gpu in GPUS)), [(name, sizes[name], *row) for name, row in budgets.items()]
    )
    lines += ["", "**Clocks of the busiest pipe, compiled (not measured)**", ""]
    lines += table(
        ("format", *targets), [(shown_name(kernel), *(shown_clocks(kernel, one) for one in targets)) for kernel in rows]
    )
    lines += ["", "**Best-case speed-up over bf16, compiled (not measured); in brackets the earlier count**", ""]
    lines += table(
        ("format", *(gpu.name for gpu in GPUS)),
        [(shown_name(kernel), *(shown_speed_up(kernel, baseline, gpu) for gpu in GPUS)) for kernel in rows],
    )
    return "\n".join(lines) + "\n"


def shown_clocks(kernel: CompiledKernel, target: str) -> str:
    """Show the busiest pipe's clocks and name; ``+`` where they are known to be too few."""
    compiled = kernel.targets.get(target)
    if compiled is None or compiled.count is None:
        return "-"
    count = compiled.count
    more = "+" if count.loops_counted_once or count.unpriced else ""
    return f"{count.busiest_clocks:.3g}{more} {count.busiest_pipe}"


def shown_speed_up(kernel: CompiledKernel, baseline: CompiledKernel, gpu: Gpu) -> str:
    """Show the best-case speed-up, and what the earlier count had."""
    found = speed_up(kernel, baseline, gpu)
    earlier = EARLIER.get(kernel.variant, {}).get(gpu.name)
    text = "-" if found is None else f"{found:.2f}"
    return text if earlier is None else f"{text} ({earlier:.2f})"


def with_tables(page: str, kernels: Sequence[CompiledKernel]) -> str:
    """Give a page with its tables written anew."""
    return TABLES.sub(lambda found: found.group(1) + tables(kernels) + found.group(2), page)


def main() -> None:
    """Write the tables into docs/kernels.md."""
    page = PAGE.read_text(encoding="utf-8")
    write_atomic(PAGE, with_tables(page, load_compiled_kernels()).encode())


if __name__ == "__main__":
    main()
