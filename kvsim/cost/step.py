"""Price of one engine step: tables over tokens and batch size, in integer ticks, and what they are made of.

A step with ``n`` decoding sequences and ``p`` prompt tokens takes

    step[n] + X + (base[n + p] - base[n]) + LM head, attention and compression of the prompts,

where X is the sum of what the decoding sequences add (kvsim.cost.sequence), base holds linear layers, elementwise
kernels and collectives, and step[n] a decode step that does not grow with context. Everything is on one
tensor-parallel rank; ranks run in step.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kvsim.cost.estimator import all_reduce_seconds, prefill_attention_seconds, price_gemm, query_key_pairs
from kvsim.cost.rates import Rates
from kvsim.cost.sequence import SequenceModel, ops_seconds
from kvsim.cost.shapes import forward_gemms, lm_head
from kvsim.deployment import Deployment, LayerClass
from kvsim.ops import Numeric, OpCall
from kvsim.specs.base import DTYPE_BITS, Dtype
from kvsim.specs.model import LayerKind
from kvsim.units import TICKS_PER_SECOND

ELEMENTWISE_KERNELS_PER_LAYER = 4
KERNELS_PER_LAYER = 9
"""Four linear layers, four elementwise kernels and attention: what an uncaptured step launches per layer."""
NO_ATTENTION = (LayerKind.LINEAR, LayerKind.MLP)
MAX_CAPTURED_TOKENS = 512
"""Largest batch that vLLM captures in a CUDA graph; less where 2·max_num_seqs is less."""


@lru_cache(maxsize=32)
def capture_sizes(max_captured_tokens: int) -> tuple[int, ...]:
    """Batch sizes with a CUDA graph: 1, 2, 4, multiples of 8 below 256, of 16 from there.

    Source: vLLM 0.15 config/vllm.py, default ``cudagraph_capture_sizes``.
    """
    sizes = (1, 2, 4, *range(8, 256, 8), *range(256, MAX_CAPTURED_TOKENS + 1, 16))
    return tuple(size for size in sizes if size <= max_captured_tokens)


def captured_size(tokens: Numeric, max_captured_tokens: int = MAX_CAPTURED_TOKENS) -> Numeric:
    """Batch size padded to the next captured one; a batch above all of them is not padded."""
    sizes = capture_sizes(max_captured_tokens)
    if isinstance(tokens, np.ndarray):
        nearest = np.minimum(np.searchsorted(sizes, tokens), len(sizes) - 1)
        return np.where(tokens > sizes[-1], tokens, np.asarray(sizes, dtype=np.float64)[nearest])
    return tokens if tokens > sizes[-1] else float(sizes[bisect_left(sizes, tokens)])


@dataclass(frozen=True, slots=True)
class StepTerms:
    """Seconds of a step's parts that depend on the number of tokens or sequences alone."""

    weights_s: Numeric
    communication_s: Numeric
    overhead_s: Numeric


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
        model, ranks = deployment.model, deployment.tensor_parallel_size
        compute = model.weight_dtype if rates.device.supports(model.weight_dtype) else Dtype.BF16
        self.gemms = tuple(
            price_gemm(gemm, rates, weight_bits=model.weight_bits, compute=compute)
            for gemm in forward_gemms(model, ranks)
        )
        self.head = price_gemm(lm_head(model, ranks), rates, weight_bits=16.0, compute=Dtype.BF16)
        kinds = [group.kind for group in model.groups for _ in group.layers]
        self._launches = sum(kind not in NO_ATTENTION for kind in kinds)
        # One all-reduce per block: two where attention and MLP share a layer, one where each is a layer.
        self._all_reduces = len(kinds) * (1 if LayerKind.MLP in kinds else 2)
        self._hidden_bytes = model.hidden_size * DTYPE_BITS[model.dtype] / 8
        self._overhead_s, self._overhead_s_per_row = self._elementwise(len(kinds))
        self._max_captured = min(2 * deployment.engine.max_num_seqs, MAX_CAPTURED_TOKENS)
        self._prefill_terms = tuple(self._prefill_term(c) for c in deployment.layer_classes)
        self.append_launch_s, self.append_s_per_token = self._ops_split(_append_ops(deployment))
        self._decode_launch_s, self._decode_s_per_sequence = self._ops_split(_decode_ops(deployment))

    def _elementwise(self, layers: int) -> tuple[float, float]:
        """Norms, RoPE and activations of a step: (launches, per row)."""
        model, rates = self.deployment.model, self.rates
        width = model.intermediate_size or (model.moe.moe_intermediate_size if model.moe else model.hidden_size)
        width_bytes = width / self.deployment.tensor_parallel_size * DTYPE_BITS[model.dtype] / 8
        moved_bytes = self._hidden_bytes * (3 * 2) + width_bytes * 3
        launch_s = ELEMENTWISE_KERNELS_PER_LAYER * rates.elementwise_launch_s
        if not self.deployment.engine.cuda_graphs:
            launch_s += KERNELS_PER_LAYER * rates.uncaptured_launch_s
        return layers * launch_s, layers * moved_bytes / rates.stream_bytes_per_s

    def padded(self, tokens: Numeric) -> Numeric:
        """Rows that the linear layers really process."""
        return captured_size(tokens, self._max_captured) if self.deployment.engine.cuda_graphs else tokens

    def token_terms(self, tokens: Numeric) -> StepTerms:
        """Parts of a step that depend on how many tokens it processes (zero tokens cost nothing)."""
        rows = self.padded(tokens)
        weights = sum((gemm.seconds(rows) for gemm in self.gemms), start=0.0 * rows)
        reduced = all_reduce_seconds(rows * self._hidden_bytes, self.deployment.tensor_parallel_size, self.rates)
        overhead = self._overhead_s + rows * self._overhead_s_per_row
        return StepTerms(
            _if_any(tokens, weights), _if_any(tokens, self._all_reduces * reduced), _if_any(tokens, overhead)
        )

    def head_seconds(self, sampled: Numeric) -> Numeric:
        """LM head for ``sampled`` sequences."""
        return _if_any(sampled, self.head.seconds(sampled))

    def decode_fixed_seconds(self, sequences: Numeric) -> tuple[Numeric, Numeric]:
        """(attention, compression) of a decode batch that does not grow with context."""
        attention = self._launches * (self.rates.attention_launch_s + sequences * self.rates.attention_per_sequence_s)
        compression = (
            self._decode_launch_s
            + self.append_launch_s
            + sequences * (self._decode_s_per_sequence + self.append_s_per_token)
        )
        attention = attention + self._state_seconds(sequences)
        return _if_any(sequences, attention), _if_any(sequences, compression)

    def _state_seconds(self, sequences: Numeric) -> Numeric:
        """Linear layers read and write each sequence's recurrent state once a step."""
        return 2.0 * self.deployment.state_bytes_per_sequence / self.rates.stream_bytes_per_s * sequences

    def prefill_attention_seconds(self, chunk_tokens: Numeric, context_tokens: int) -> tuple[Numeric, Numeric]:
        """(attention, unpacking) of one chunk of ``chunk_tokens`` after ``context_tokens`` already cached."""
        attention: Numeric = 0.0
        unpack: Numeric = 0.0
        for term in self._prefill_terms:
            read_tokens = context_tokens if term.window_tokens is None else min(context_tokens, term.window_tokens)
            pairs = query_key_pairs(chunk_tokens, context_tokens, term.window_tokens)
            computed_s = prefill_attention_seconds(chunk_tokens, pairs, term.flops_per_pair, self.rates)
            attention += term.layers * (computed_s + read_tokens * term.context_read_s)
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


def _if_any(count: Numeric, seconds: Numeric) -> Numeric:
    """``seconds`` where ``count`` is positive: what does not run has no launch either."""
    if isinstance(count, np.ndarray):
        return np.where(count > 0, seconds, 0.0)
    return seconds if count > 0 else 0.0


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
    append: list[int]
    """Encoding the tokens of a prompt, by their number."""


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
        first_chunk=[0, *_ticks(first_chunk).tolist()],
        append_launch=round(step.append_launch_s * TICKS_PER_SECOND),
        append=_ticks(np.arange(max_tokens + 1, dtype=np.float64) * step.append_s_per_token).tolist(),
    )


def _ticks(seconds: Numeric) -> npt.NDArray[np.int64]:
    return np.rint(np.asarray(seconds, dtype=np.float64) * TICKS_PER_SECOND).astype(np.int64)
