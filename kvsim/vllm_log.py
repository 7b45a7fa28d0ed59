"""What a vLLM server's log says about its start: options, and where it put the memory.

Read are the lines of the V1 engine from 0.8 to 0.15 and the later spellings of the same lines, with or without colours
and prefixes such as ``(EngineCore_DP0 pid=123) INFO 11-22 10:00:00 [gpu_worker.py:298]``. Of several ranks the one with
least room for KV counts, as the engine takes it.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvsim.errors import InvalidSpec

MAX_LINE_BYTES: Final = 1 << 20
MAX_NUMBER: Final = 1e15
GIB: Final = 2**30
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_NUMBER = r"(-?\d[\d,]*(?:\.\d+)?)"
_SIZES: Final[Mapping[str, re.Pattern[str]]] = {
    # Before 0.9 the unit is printed as GB and meant as GiB.
    "weights_gib": re.compile(rf"Model loading took {_NUMBER} G(?:i?)B"),
    "kv_gib": re.compile(rf"Available KV cache memory: {_NUMBER} GiB"),
    "kv_tokens": re.compile(rf"GPU KV cache size: {_NUMBER} tokens"),
    "blocks": re.compile(rf"(?:# (?:GPU|cuda) blocks: |num_gpu_blocks is: ){_NUMBER}"),
    "graphs_gib": re.compile(rf"Graph capturing finished in {_NUMBER} secs?, took {_NUMBER} GiB"),
    "graphs_estimated_gib": re.compile(rf"Estimated CUDA graph memory: {_NUMBER} GiB"),
    "total_gib": re.compile(rf"Free memory on device \({_NUMBER}/{_NUMBER} GiB\)"),
    "activations_gib": re.compile(rf"{_NUMBER} GiB for peak activation"),
    "non_torch_gib": re.compile(rf"{_NUMBER} GiB for non-torch memory"),
    "consumed_gib": re.compile(rf"{_NUMBER} GiB for consumed memory"),
    "concurrency": re.compile(rf"Maximum concurrency for {_NUMBER} tokens per request: {_NUMBER}x"),
}
"""Of a line with several numbers the last counts."""
_LEAST: Final = frozenset({"kv_gib", "kv_tokens", "blocks", "concurrency", "total_gib"})
_OPTIONS: Final = (
    "model", "model_tag", "dtype", "quantization", "tensor_parallel_size", "pipeline_parallel_size",
    "data_parallel_size", "max_model_len", "max_seq_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_dtype",
    "enable_prefix_caching", "enable_chunked_prefill", "chunked_prefill_enabled", "gpu_memory_utilization",
    "block_size", "num_gpu_blocks_override", "kv_cache_memory_bytes", "enforce_eager", "async_scheduling",
    "speculative_config", "enable_lora",
)  # fmt: skip
_RENAMED: Final = {
    "model_tag": "model",
    "max_seq_len": "max_model_len",
    "chunked_prefill_enabled": "enable_chunked_prefill",
}
_ARGUMENTS = re.compile(r"(?:non-default args: \{|args: Namespace\(|LLM engine \(v[^)]*\) with config: )(.*)")
_PAIR = re.compile(r"'?(\w+)'?\s*[:=]\s*('[^']*'|\"[^\"]*\"|[\w.+\-]+)")
_VERSION = re.compile(
    r"(?:LLM engine \(v|vLLM API server version |[^\w.]version )(\d{1,3}\.\d{1,3}(?:\.\d{1,3})?)(?![\d.]*\w*:)"
)
_FURTHER: Final = (
    ("max_num_batched_tokens", re.compile(rf"max_num_batched_tokens={_NUMBER}")),
    ("max_model_len", re.compile(rf"Using max model len {_NUMBER}")),
    ("gpu_memory_utilization", re.compile(rf"Desired GPU memory utilization is \({_NUMBER},")),
    ("num_gpu_blocks_override", re.compile(rf"with num_gpu_blocks_override={_NUMBER}")),
)
_ASYNC = re.compile(r"Asynchronous scheduling is (enabled|disabled)")
_GPU = re.compile(r"\bGPU 0: (.+?)(?: \(UUID|$)")
_GRAPHS_RESERVED = "CUDA graph memory profiling is enabled"


@dataclass(frozen=True)
class VllmLog:
    """A start of vLLM. Sizes in GiB as the log prints them; None where it prints none."""

    name: str
    options: Mapping[str, Any]
    """By vLLM's names; what the command line gave wins over what the engine printed."""
    sizes: Mapping[str, float]
    version: str | None
    device: str | None
    """As the driver names it, where the log holds ``GPU 0: ...``."""
    is_server: bool
    reserves_graphs: bool
    """Whether the estimate of CUDA graph memory was taken off the pool."""

    def number(self, name: str) -> int | None:
        """Option as a whole number; None where it is absent.

        Raises
        ------
        InvalidSpec
            The option has another sort of value.
        """
        value = self.options.get(name)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) < MAX_NUMBER or value != int(value):
            msg = f"{self.name}: {name} is {value!r:.40}, which is not a whole number of any engine's size"
            raise InvalidSpec(msg)
        return int(value)


def read_vllm_log(path: Path) -> VllmLog:
    """Read a log from a file.

    Raises
    ------
    InvalidSpec
        The file cannot be read, or no line of it says how large the KV cache is.
    """
    try:
        with path.open("rb") as stream:
            chunks = iter(lambda: stream.readline(MAX_LINE_BYTES), b"")
            return parse_vllm_log((chunk.decode("utf-8", errors="replace") for chunk in chunks), str(path))
    except OSError as error:
        msg = f"{path}: cannot read: {error.strerror}"
        raise InvalidSpec(msg) from error


def parse_vllm_log(lines: Iterable[str], name: str) -> VllmLog:
    """Find what a log says; see `read_vllm_log`."""
    given: dict[str, Any] = {}
    printed: dict[str, Any] = {}
    sizes: defaultdict[str, list[float]] = defaultdict(list)
    version = device = None
    is_server = reserves_graphs = False
    for raw in lines:
        line = _ANSI.sub("", raw).rstrip()
        version = version or _found(_VERSION, line)
        device = device or _found(_GPU, line)
        is_server = is_server or "APIServer" in line or "vLLM API server" in line
        reserves_graphs = reserves_graphs or _GRAPHS_RESERVED in line
        for key, number in _sizes(line):
            sizes[key].append(number)
        options = given if "LLM engine (v" not in line else printed
        for key, value in _options(line):
            options.setdefault(key, value)
        for key, value in _further(line):
            printed.setdefault(key, value)
    if not sizes.keys() & {"kv_gib", "kv_tokens", "blocks"}:
        msg = (
            f"{name}: no line says how large the KV cache is ('GPU KV cache size: N tokens', 'Available KV cache "
            "memory: N GiB' or '# GPU blocks: N'); give the log of a vLLM server, version 0.8 or later, from its start"
        )
        raise InvalidSpec(msg)
    found = {key: min(values) if key in _LEAST else max(values) for key, values in sizes.items()}
    return VllmLog(name, {**printed, **given}, found, version, device, is_server, reserves_graphs)


def _found(pattern: re.Pattern[str], line: str) -> str | None:
    match = pattern.search(line)
    return match[1].strip() if match else None


def _sizes(line: str) -> Iterator[tuple[str, float]]:
    for key, pattern in _SIZES.items():
        match = pattern.search(line)
        if match is not None:
            value = _number(match[match.lastindex or 1])
            if value is not None:
                yield key, value


def _number(text: str) -> float | None:
    """Number with commas between thousands; None where no engine prints such a one."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if abs(value) < MAX_NUMBER else None


def _options(line: str) -> Iterator[tuple[str, Any]]:
    """Options of a line that lists them, as a dict, a Namespace or ``key=value`` with commas."""
    match = _ARGUMENTS.search(line)
    if match is None:
        return
    for key, text in _PAIR.findall(match[1]):
        name = _RENAMED.get(key, key)
        value = _literal(text)
        if key in _OPTIONS and value is not None:
            yield name, value


def _further(line: str) -> Iterator[tuple[str, Any]]:
    """Options that the engine prints one by one."""
    for key, pattern in _FURTHER:
        found = _found(pattern, line)
        value = _number(found) if found else None
        if value is not None:
            yield key, value
    scheduling = _found(_ASYNC, line)
    if scheduling:
        yield "async_scheduling", scheduling == "enabled"


def _literal(text: str) -> Any:
    """Value as Python prints it; a name that is no literal (``torch.bfloat16``) as its last part."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text.rpartition(".")[2]
    return value if isinstance(value, str | int | float | bool) else None
