"""Price of one engine step: tables over tokens and batch size, in integer ticks, and what they are made of.

A step with ``n`` decoding sequences and ``p`` prompt tokens takes

    base[n + p] + fixed[n] + X + prefill attention + compression of the prompt,

where X is the sum of what the decoding sequences add (kvsim.cost.sequence) and base holds linear layers, elementwise
kernels and collectives. Everything is on one tensor-parallel rank; ranks run in step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvsim.cost.estimator import all_reduce_seconds, gemm_seconds
from kvsim.cost.rates import Rates
from kvsim.cost.sequence import SequenceModel, ops_seconds
from kvsim.cost.shapes import forward_gemms, lm_head
from kvsim.deployment import Deployment, LayerClass
from kvsim.ops import Numeric, OpCall
from kvsim.specs.base import DTYPE_BITS, Dtype
from kvsim.specs.model import LayerKind
from kvsim.units import TICKS_PER_SECOND

FloatArray = npt.NDArray[np.float64]
ELEMENTWISE_KERNELS_PER_LAYER = 4
KERNELS_PER_LAYER = 9
"""Four linear layers, four elementwise kernels and attention: what an uncaptured step launches per layer."""
NO_ATTENTION = (LayerKind.LINEAR, LayerKind.MLP)
MAX_CAPTURED_TOKENS = 512
"""Largest batch that vLLM captures in a CUDA graph (min(2·max_num_seqs, 512))."""


def captured_size(tokens: Numeric) -> FloatArray:
    """Batch size padded to the next captured one: 1, 2, 4, multiples of 8 to 256, of 16 to 512; more is not padded.

    Source: vLLM 0.15 config/vllm.py, default ``cudagraph_capture_sizes``.
    """
    count = np.asarray(tokens, dtype=np.float64)
    by_eight = np.ceil(count / 8) * 8
    by_sixteen = np.ceil(count / 16) * 16
    padded = np.where(count <= 256, by_eight, by_sixteen)
    padded = np.where(count <= 4, 4, padded)
    padded = np.where(count <= 2, np.maximum(count, 0), padded)
    return np.where(count > MAX_CAPTURED_TOKENS, count, padded)


@dataclass(frozen=True)
class StepTerms:
    """Seconds of a step's parts that depend on the number of tokens or sequences alone."""

    weights_s: FloatArray
    communication_s: FloatArray
    overhead_s: FloatArray


@dataclass(frozen=True)
class PrefillTerm:
    """Prefill attention of one layer class over a chunk: FLOPs per query-key pair, and reading the cached context."""

    layers: int
    flops_per_pair: float
    window_tokens: int | None
    context_read_s: float
    context_unpack_s: float


class StepModel:
    """Prices the steps of one deployment at one edge of the priors."""

    def __init__(self, deployment: Deployment, rates: Rates) -> None:
        self.deployment = deployment
        self.rates = rates
        self.sequences = SequenceModel(deployment, rates)
        model = deployment.model
        self._gemms = forward_gemms(model, deployment.tensor_parallel_size)
        self._head = lm_head(model, deployment.tensor_parallel_size)
        compute = model.weight_dtype if rates.device.supports(model.weight_dtype) else Dtype.BF16
        self._compute = compute
        self._prefill_terms = tuple(self._prefill_term(c) for c in deployment.layer_classes)
        self._append = _append_ops(deployment)
        self._decode_ops = _decode_ops(deployment)
        self.append_launch_s, self.append_s_per_token = self._ops_split(self._append)
        self._decode_launch_s, self._decode_s_per_sequence = self._ops_split(self._decode_ops)

    def padded(self, tokens: Numeric) -> FloatArray:
        """Rows that the linear layers really process."""
        if self.deployment.engine.cuda_graphs:
            return captured_size(tokens)
        return np.asarray(tokens, dtype=np.float64)

    def token_terms(self, tokens: Numeric) -> StepTerms:
        """Parts of a step that depend on how many tokens it processes (zero tokens cost nothing)."""
        count = np.atleast_1d(np.asarray(tokens, dtype=np.float64))
        busy = count > 0
        rows = np.maximum(self.padded(count), 1.0)
        model, rates, tp = self.deployment.model, self.rates, self.deployment.tensor_parallel_size
        weights = np.zeros_like(rows)
        for gemm in self._gemms:
            weights = weights + gemm_seconds(gemm, rows, rates, weight_bits=model.weight_bits, compute=self._compute)
        hidden_bytes = rows * model.hidden_size * DTYPE_BITS[model.dtype] / 8
        communication = 2.0 * model.num_layers * all_reduce_seconds(hidden_bytes, tp, rates)
        width = model.intermediate_size or (model.moe.moe_intermediate_size if model.moe else model.hidden_size)
        moved_bytes = hidden_bytes * (3 * 2) + rows * (width / tp) * 3 * DTYPE_BITS[model.dtype] / 8
        overhead = model.num_layers * (
            ELEMENTWISE_KERNELS_PER_LAYER * rates.elementwise_launch_s + moved_bytes / rates.stream_bytes_per_s
        )
        if not self.deployment.engine.cuda_graphs:
            overhead = overhead + model.num_layers * KERNELS_PER_LAYER * rates.uncaptured_launch_s
        return StepTerms(
            np.where(busy, weights, 0.0), np.where(busy, communication, 0.0), np.where(busy, overhead, 0.0)
        )

    def head_seconds(self, sampled: Numeric) -> FloatArray:
        """LM head for ``sampled`` sequences."""
        count = np.atleast_1d(np.asarray(sampled, dtype=np.float64))
        seconds = gemm_seconds(self._head, np.maximum(count, 1.0), self.rates, weight_bits=16.0, compute=Dtype.BF16)
        return np.where(count > 0, seconds, 0.0)

    def decode_fixed_seconds(self, sequences: Numeric) -> tuple[FloatArray, FloatArray]:
        """(attention, compression) of a decode batch that does not grow with context."""
        count = np.atleast_1d(np.asarray(sequences, dtype=np.float64))
        busy = count > 0
        launches = sum(group.num_layers for group in self.deployment.model.groups if group.kind not in NO_ATTENTION)
        attention = launches * (self.rates.attention_launch_s + count * self.rates.attention_per_sequence_s)
        attention = attention + self._state_seconds(count)
        compression = (
            self._decode_launch_s
            + self.append_launch_s
            + count * (self._decode_s_per_sequence + self.append_s_per_token)
        )
        return np.where(busy, attention, 0.0), np.where(busy, compression, 0.0)

    def _state_seconds(self, count: FloatArray) -> FloatArray:
        """Linear layers read and write each sequence's recurrent state once a step."""
        moved_bytes = 2.0 * self.deployment.state_bytes_per_sequence * count
        return np.asarray(moved_bytes / self.rates.stream_bytes_per_s)

    def prefill_attention_seconds(self, chunk_tokens: Numeric, context_tokens: int) -> tuple[Numeric, Numeric]:
        """(attention, unpacking) of one chunk of ``chunk_tokens`` after ``context_tokens`` already cached."""
        rates = self.rates
        attention: Numeric = 0.0
        unpack: Numeric = 0.0
        length = chunk_tokens + context_tokens
        slowdown = (length + rates.attention_half_tokens) / (length * rates.attention_flops_per_s)
        for term in self._prefill_terms:
            pairs = chunk_tokens * context_tokens + chunk_tokens * (chunk_tokens + 1) / 2
            read_tokens = context_tokens
            if term.window_tokens is not None:
                pairs = np.minimum(pairs, chunk_tokens * float(term.window_tokens))
                read_tokens = min(context_tokens, term.window_tokens)
            attention += term.layers * (
                rates.attention_launch_s + term.flops_per_pair * pairs * slowdown + read_tokens * term.context_read_s
            )
            unpack += term.layers * read_tokens * term.context_unpack_s
        return attention, unpack

    def _prefill_term(self, layer_class: LayerClass) -> PrefillTerm:
        group, model = layer_class.group, self.deployment.model
        heads = model.num_attention_heads / self.deployment.tensor_parallel_size
        key_dim, value_dim = group.k_head_dim, group.v_head_dim or group.k_head_dim
        if group.is_latent and model.mla is not None:
            # Prefill runs MLA un-absorbed, on per-head keys and values.
            key_dim = model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim
            value_dim = model.mla.v_head_dim
        stored = layer_class.encoding.bytes_per_token(group, model.dtype).total_bytes * layer_class.rank_share
        family = layer_class.encoding.unpack_family
        unpack_s = 0.0
        if family is not None:
            elements = group.kv_elements_per_token * layer_class.rank_share
            unpack_s = elements / self.rates.unpack_elements_per_s(family)
        return PrefillTerm(
            layers=group_layers(layer_class),
            flops_per_pair=2.0 * heads * (key_dim + value_dim),
            window_tokens=group.window_tokens if group.kind is not LayerKind.INDEXED else None,
            context_read_s=stored / self.rates.stream_bytes_per_s,
            context_unpack_s=unpack_s,
        )

    def _ops_split(self, ops: tuple[OpCall, ...]) -> tuple[float, float]:
        launch_s = sum(call.count * call.work.launches for call in ops) * self.rates.elementwise_launch_s
        whole_s = ops_seconds(ops, self.deployment.tensor_parallel_size, self.rates)
        return launch_s, whole_s - launch_s


def group_layers(layer_class: LayerClass) -> int:
    """Layers in the class."""
    return sum(layers for _, layers in layer_class.bands)


def _append_ops(deployment: Deployment) -> tuple[OpCall, ...]:
    """Encoding one new token in every layer."""
    return tuple(
        _repeated(call, group_layers(layer_class))
        for layer_class in deployment.layer_classes
        for call in layer_class.encoding.append_ops(layer_class.group, deployment.model)
    )


def _decode_ops(deployment: Deployment) -> tuple[OpCall, ...]:
    """Context-independent work of one sequence in one decode step, every layer."""
    calls = []
    for layer_class in deployment.layer_classes:
        layers = group_layers(layer_class)
        calls += [_repeated(c, layers) for c in layer_class.encoding.decode_ops(layer_class.group, deployment.model)]
        if layer_class.selection is None:
            continue
        for view, size in layer_class.bands:
            calls += [_repeated(c, size) for c in layer_class.selection.decode_ops(view, deployment.model)]
    return tuple(calls)


def _repeated(call: OpCall, layers: int) -> OpCall:
    return OpCall(call.name, call.work, call.component, call.count * layers)


@dataclass(frozen=True)
class StepTables:
    """Integer tick tables for the simulator's hot loop.

    ``base[t]``: a step of t tokens; ``step[n]``: a whole decode step of n sequences except what grows with context
    (``base[n]``, LM head, attention floor, per-sequence work); the rest splits those sums for the report.
    """

    base: list[int]
    step: list[int]
    head: list[int]
    weights: list[int]
    communication: list[int]
    overhead: list[int]
    attention_fixed: list[int]
    compression_fixed: list[int]
    first_chunk: list[int]
    """Prefill attention of a prompt's first chunk, by its tokens."""
    append_launch: int
    append_per_token: int


def build_tables(step: StepModel, max_tokens: int, max_sequences: int) -> StepTables:
    """Price every token count up to ``max_tokens`` and every batch up to ``max_sequences``."""
    terms = step.token_terms(np.arange(max_tokens + 1, dtype=np.float64))
    weights, communication, overhead = (
        _ticks(part) for part in (terms.weights_s, terms.communication_s, terms.overhead_s)
    )
    base = weights + communication + overhead
    first_chunk, _ = step.prefill_attention_seconds(np.arange(1, max_tokens + 1, dtype=np.float64), 0)
    sequences = np.arange(max_sequences + 1, dtype=np.float64)
    attention, compression = step.decode_fixed_seconds(sequences)
    head = _ticks(step.head_seconds(sequences))
    attention_ticks, compression_ticks = _ticks(attention), _ticks(compression)
    return StepTables(
        base=base.tolist(),
        step=(base[: max_sequences + 1] + head + attention_ticks + compression_ticks).tolist(),
        head=head.tolist(),
        weights=weights.tolist(),
        communication=communication.tolist(),
        overhead=overhead.tolist(),
        attention_fixed=attention_ticks.tolist(),
        compression_fixed=compression_ticks.tolist(),
        first_chunk=[0, *_ticks(np.asarray(first_chunk)).tolist()],
        append_launch=round(step.append_launch_s * TICKS_PER_SECOND),
        append_per_token=round(step.append_s_per_token * TICKS_PER_SECOND),
    )


def _ticks(seconds: FloatArray) -> npt.NDArray[np.int64]:
    return np.rint(seconds * TICKS_PER_SECOND).astype(np.int64)
