"""Options by engine: whose each one is, what each engine calls the shared ones, and each engine's defaults.

Every engine limits sequences and tokens per step and has a block size; ``EngineSpec`` keeps those under vLLM's names
and also takes them under the engine's own. Defaults: SGLang 0.5 ``server_args.py`` (``chunked_prefill_size`` is 8192
where a device has 60 GiB or more; ``max_running_requests`` is derived from the pool and at least 2048), TensorRT-LLM
1.2 ``llmapi/llm_args.py``, llama.cpp ``common.h`` (``n_parallel``, ``n_batch``, ``n_ubatch``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

OWN_NAMES: Final[Mapping[str, Mapping[str, str]]] = {
    "sglang": {
        "max_running_requests": "max_num_seqs",
        "chunked_prefill_size": "max_num_batched_tokens",
        "page_size": "block_size",
    },
    "tensorrt_llm": {
        "max_batch_size": "max_num_seqs",
        "max_num_tokens": "max_num_batched_tokens",
        "tokens_per_block": "block_size",
        "enable_block_reuse": "enable_prefix_caching",
        "max_seq_len": "max_model_len",
    },
    "llamacpp": {"parallel": "max_num_seqs", "n_batch": "max_num_batched_tokens"},
}
"""The engine's own name of an option that all engines have: (own, vLLM's)."""

DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "sglang": {"max_num_seqs": 2048, "block_size": 1},
    "tensorrt_llm": {"max_num_seqs": 2048, "block_size": 32, "enable_chunked_prefill": False},
    "llamacpp": {"max_num_seqs": 1, "max_num_batched_tokens": 2048},
}
"""Where an engine's default is not vLLM's."""

MEMORY_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "vllm": (
        "gpu_memory_utilization", "num_gpu_blocks_override", "kv_cache_memory_bytes", "cuda_graph_memory_bytes",
        "version",
    ),
    "sglang": ("mem_fraction_static",),
    "tensorrt_llm": ("free_gpu_memory_fraction",),
    "llamacpp": ("ctx_size",),
}  # fmt: skip
"""Options that only one engine has; they mean different things, so none is read for another engine."""

OWNERS: Final[Mapping[str, tuple[str, ...]]] = {
    **{name: (kind,) for kind, names in MEMORY_OPTIONS.items() for name in names},
    "scheduling_policy": ("vllm",),
    "long_prefill_token_threshold": ("vllm",),
    "kv_offloading_size": ("vllm",),
    "kv_tiers": ("vllm",),
    "compression_stream": ("vllm",),
    "speculative_config": ("vllm",),
    "max_prefill_tokens": ("sglang",),
    "enable_mixed_chunk": ("sglang",),
    "schedule_conservativeness": ("sglang",),
    "schedule_policy": ("sglang",),
    "scheduler_recv_interval": ("sglang",),
    "capacity_scheduler_policy": ("tensorrt_llm",),
    "batch_wait_timeout_iters": ("tensorrt_llm",),
    "batch_wait_max_tokens_ratio": ("tensorrt_llm",),
    "n_ubatch": ("llamacpp",),
}
"""Engines under which an option may differ from its default."""


def with_engine_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """Replace an engine's own names by the shared ones and fill in its defaults.

    Raises
    ------
    ValueError
        An option under another engine's name, or under both of its names.
    """
    kind, named = given.get("kind", "vllm"), dict(given)
    if not isinstance(kind, str):
        return named  # no engine: the field itself says which there are
    for own, shared in OWN_NAMES.get(kind, {}).items():
        if own in named:
            if shared in named:
                msg = f"{own} and {shared} are two names of one option of {kind}; give one"
                raise ValueError(msg)
            named[shared] = named.pop(own)
    _refuse_foreign_names(kind, named)
    _translate_overlap(kind, named)
    if kind == "sglang" and named.get("max_num_batched_tokens") == -1:
        # SGLang's spelling of no chunking; a prefill batch is then bounded by max_prefill_tokens alone.
        named["enable_chunked_prefill"] = False
        named["max_num_batched_tokens"] = named.get("max_prefill_tokens") or MAX_PREFILL_TOKENS
    return {**DEFAULTS.get(kind, {}), **named}


NO_OVERLAP: Final[Mapping[str, str]] = {
    "sglang": "disable_overlap_schedule",
    "tensorrt_llm": "disable_overlap_scheduler",
}
"""The engine's own name of the opposite of ``async_scheduling``."""


OTHER_NAMES: Final[Mapping[str, str]] = {
    **{own: shared for names in OWN_NAMES.values() for own, shared in names.items()},
    **dict.fromkeys(NO_OVERLAP.values(), "async_scheduling"),
}
"""Every name that is not the shared one."""


def _translate_overlap(kind: Any, named: dict[str, Any]) -> None:
    for owner, name in NO_OVERLAP.items():
        if name not in named:
            continue
        if owner != kind:
            msg = f"{name} is {owner}'s name, and engine.kind is {kind}; leave it out"
            raise ValueError(msg)
        if "async_scheduling" in named or not isinstance(named[name], bool):
            msg = f"{name} must be true or false and stand alone; async_scheduling is the other name of its opposite"
            raise ValueError(msg)
        named["async_scheduling"] = not named.pop(name)


MAX_PREFILL_TOKENS: Final = 16384
"""SGLang's default of ``max_prefill_tokens``."""


def _refuse_foreign_names(kind: Any, named: Mapping[str, Any]) -> None:
    for other, names in OWN_NAMES.items():
        for own in names:
            if other != kind and own in named and own not in OWN_NAMES.get(kind, {}):
                shared = names[own]
                here = next((name for name, one in OWN_NAMES.get(kind, {}).items() if one == shared), shared)
                msg = f"{own} is {other}'s name, and engine.kind is {kind}; there it is {here}"
                raise ValueError(msg)


def refuse_foreign(kind: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError for an option of another engine that differs from its default."""
    for name, owners in OWNERS.items():
        if name not in options or kind in owners or options[name] == defaults[name]:
            continue
        advice = "leave it out"
        if any(name in names for names in MEMORY_OPTIONS.values()):
            advice = f"memory options of {kind}: {', '.join(MEMORY_OPTIONS[kind])}"
        msg = f"{name} is an option of {' and '.join(owners)}, and engine.kind is {kind}; {advice}"
        raise ValueError(msg)
