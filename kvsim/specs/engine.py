"""The serving engine's options, in vLLM's names and defaults where vLLM has the option."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from kvsim.specs.base import Spec
from kvsim.specs.engine_options import MAX_PREFILL_TOKENS, OTHER_NAMES, refuse_foreign, with_engine_names
from kvsim.specs.speculation import SpeculativeConfig
from kvsim.specs.tier import HostTier, KvReload, KvTier
from kvsim.units import Bytes, Seconds

Count = Annotated[int, Field(gt=0)]
SkippedLayers = tuple[int | Literal["sliding_window"], ...]
Share = Annotated[float, Field(gt=0, le=1)]
EngineKind = Literal["vllm", "sglang", "tensorrt_llm", "llamacpp"]
DEFAULT_UTILIZATION: Final = 0.92


class SamplingSpec(Spec):
    """Sampling parameters of all requests, in vLLM's names; None is not stated."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """-1 or 0 keeps every token."""

    def filled_from(self, other: SamplingSpec | None) -> SamplingSpec:
        """These parameters, and those of ``other`` where they are not stated."""
        if other is None:
            return self
        return SamplingSpec(**{**other.model_dump(exclude_none=True), **self.model_dump(exclude_none=True)})

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken: no temperature stated, or 0."""
        return not self.temperature

    @property
    def truncates(self) -> bool:
        """Whether tokens are left out by top_p or top_k."""
        return not self.is_greedy and ((self.top_p or 1.0) < 1.0 or (self.top_k or 0) > 0)


class EngineSpec(Spec):
    """Options of one engine instance; spelling and defaults follow ``vllm serve``, as of late 2026."""

    kind: EngineKind = "vllm"
    """Decides the scheduler, the allocator's rules, and which option says how much memory the engine may take."""
    version: Annotated[str, StringConstraints(pattern=r"^\d{1,3}\.\d{1,3}(\.\d{1,3})?$")] | None = None
    """Release of vLLM whose memory rules apply, such as 0.15.1; None takes the latest that kvsim knows."""
    block_size: Literal[1, 8, 16, 32, 64, 128] = 16
    max_num_seqs: Count = 256
    max_num_batched_tokens: Count = 8192
    max_model_len: Count | None = None
    """Longest prompt plus output; None takes the model's own limit, or what the KV pool can hold if less."""
    gpu_memory_utilization: Share = DEFAULT_UTILIZATION
    """vLLM: the engine's share of the whole device, weights and activations included."""
    mem_fraction_static: Share | None = None
    """SGLang: weights and KV pool as a share of the device; None takes its fallback of 0.88."""
    free_gpu_memory_fraction: Share | None = None
    """TensorRT-LLM: the KV pool's share of what weights and buffers leave free; None takes its default of 0.9."""
    ctx_size: Count | None = None
    """llama.cpp: KV cells in tokens, cut equally among ``max_num_seqs`` slots; None takes all memory that is left."""
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    num_gpu_blocks_override: Count | None = None
    kv_cache_memory_bytes: Bytes | None = None
    cuda_graph_memory_bytes: Bytes | None = None
    """vLLM from 0.21: what its log calls ``Estimated CUDA graph memory`` and takes off the pool."""
    kv_cache_dtype_skip_layers: SkippedLayers = ()
    kv_offloading_size: Bytes | None = None
    """Host memory for KV blocks, over all tensor-parallel ranks of a replica; None offloads nothing. Blocks are copied
    out as they are computed and copied back on a prefix hit, beside the engine's steps. Short for one host tier."""
    kv_tiers: tuple[KvTier, ...] = ()
    """Where KV blocks go beside the device's pool, nearest first."""
    kv_reload: KvReload = "always"
    """Whether blocks found in a tier are always loaded, or only where computing them is estimated to take longer: for
    the prompt itself (``by_cost``), or for all who would wait for its prefill together (``by_total_cost``)."""
    compression_stream: Literal["inline", "side"] = "inline"
    """Where scoring and compaction after a prompt run: inside the step, or beside later steps, sharing the device."""
    fused_input_quantization: bool = False
    """Kernels before FP8 linear layers write their inputs in 8 bits, so that the layers quantise nothing themselves:
    vLLM's ``pass_config`` for norms, activations and attention, TensorRT-LLM's Llama."""
    attention_kernel: str = "auto"
    """Attention kernel as calibration sets name it, such as ``vllm/flash_attn_fa3``, for the operations and formats
    that it has; ``auto`` takes the set's default."""
    all2all_backend: Literal["allgather_reducescatter", "deepep_low_latency", "deepep_high_throughput"] = (
        "allgather_reducescatter"
    )
    """How tokens reach experts on other data parallel ranks, and come back."""
    sampling: SamplingSpec = SamplingSpec()
    """How tokens are drawn; None in it takes what the model's preset states, or greedy."""
    use_flashinfer_sampler: bool = False
    """Draw by FlashInfer's kernels, which do not sort the vocabulary (VLLM_USE_FLASHINFER_SAMPLER)."""
    async_scheduling: bool | None = None
    """Plan a step while the one before it runs; None takes the engine's default: on, off for llama.cpp.
    Source: vLLM 0.15.1 config/vllm.py, on for the mp and uni executors."""
    request_overhead_s: Seconds | None = None
    """Time of a request outside the engine (HTTP, tokeniser, detokeniser, streaming), part before it and part after;
    None takes the engine's prior, nothing for llama.cpp. Zero for a caller in the engine's own process."""
    front_end_requests_per_s: Annotated[float, Field(gt=0)] | None = None
    """Requests per second that one API server lets through, in order of arrival; None is no limit."""
    cuda_graphs: bool = True
    """Pad decode batches to captured sizes and pay one launch per graph instead of one per kernel."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    """vLLM. ``priority``: the lowest value first, then the earliest; the highest is preempted first."""
    long_prefill_token_threshold: Annotated[int, Field(ge=0)] = 0
    """vLLM. Most tokens of one prompt in a step, so that several prompts share it; 0 sets no such limit."""
    max_prefill_tokens: Count = MAX_PREFILL_TOKENS
    """SGLang. A prefill batch takes no further prompt once it holds this many tokens."""
    enable_mixed_chunk: bool = False
    """SGLang. Decode along with prompts in one step instead of prompts first."""
    schedule_conservativeness: Annotated[float, Field(ge=0)] = 1.0
    """SGLang. Scales how much of their unspent output running requests are expected to need."""
    schedule_policy: Literal["fcfs", "lpm"] = "fcfs"
    """SGLang. Order of the waiting queue: arrival, or longest cached prefix first."""
    capacity_scheduler_policy: Literal["guaranteed_no_evict", "max_utilization"] = "guaranteed_no_evict"
    """TensorRT-LLM. Admit a request only if all running ones can end beside it, or as soon as its prompt fits."""
    scheduler_recv_interval: Count = 1
    """SGLang. While it decodes, look for new requests once in this many steps; a prompt is followed by a look."""
    batch_wait_timeout_iters: Annotated[int, Field(ge=0)] = 0
    """TensorRT-LLM. Steps for which prompts wait, while others decode, for more prompts to share their step."""
    batch_wait_max_tokens_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """TensorRT-LLM. Share of ``max_num_tokens`` with which a step waits no longer; 0 never waits."""
    n_ubatch: Count = 512
    """llama.cpp. Tokens computed at once: a larger batch is cut into such parts."""
    speculative_config: SpeculativeConfig | None = None
    """vLLM. Draft tokens that one step verifies; None decodes one token a step."""

    other_names: ClassVar[Mapping[str, str]] = OTHER_NAMES

    @model_validator(mode="before")
    @classmethod
    def _own_names(cls, given: Any) -> Any:
        return with_engine_names(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _own_options(self) -> Self:
        fields = type(self).model_fields
        refuse_foreign(self.kind, self.__dict__, {name: field.default for name, field in fields.items()})
        if self.block_size == 1 and self.kind != "sglang":
            msg = f"block_size 1 is SGLang's page size, and engine.kind is {self.kind}; allowed are 8, 16, 32, 64, 128"
            raise ValueError(msg)
        if (
            self.kind == "tensorrt_llm"
            and self.enable_chunked_prefill
            and self.max_num_batched_tokens < self.block_size
        ):
            msg = (
                f"max_num_tokens {self.max_num_batched_tokens} is less than tokens_per_block {self.block_size}, and "
                "prompts are cut to whole blocks"
            )
            raise ValueError(msg)
        return self

    @property
    def release(self) -> tuple[int, int] | None:
        """Major and minor number of ``version``."""
        if self.version is None:
            return None
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    @model_validator(mode="after")
    def _a_token_per_slot(self) -> Self:
        if self.ctx_size is not None and self.ctx_size < self.max_num_seqs:
            msg = f"ctx_size {self.ctx_size} leaves no token for each of max_num_seqs {self.max_num_seqs} slots"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _one_loop(self) -> Self:
        if self.kind == "llamacpp" and self.async_scheduling:
            msg = (
                "async_scheduling=true cannot go with kind='llamacpp': its server runs one batch after the other; "
                "leave async_scheduling out"
            )
            raise ValueError(msg)
        return self

    @property
    def tokens_at_once(self) -> int:
        """Most tokens that one forward pass computes."""
        budget = self.max_num_batched_tokens
        return min(budget, self.n_ubatch) if self.kind == "llamacpp" else budget

    @property
    def schedules_ahead(self) -> bool:
        """Whether a step is planned while the one before it runs."""
        return self.kind != "llamacpp" if self.async_scheduling is None else self.async_scheduling

    @property
    def all_kv_tiers(self) -> tuple[KvTier, ...]:
        """Tiers in order of nearness, with ``kv_offloading_size`` spelled out."""
        if self.kv_offloading_size is None:
            return self.kv_tiers
        return (HostTier(size=self.kv_offloading_size), *self.kv_tiers)
