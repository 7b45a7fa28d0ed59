"""Price of one engine step: tables over tokens and batch size, in integer ticks, and what they are made of.

A step with ``n`` decoding sequences and ``p`` prompt tokens takes

    step[n] + X + (base[n + p] - base[n]) + LM head, attention and compression of the prompts,

where X is the sum of what the decoding sequences add (kvsim.cost.sequence), base holds linear layers, elementwise
kernels and collectives, and step[n] a decode step that does not grow with context. Everything is on one
tensor-parallel rank; ranks run in step. Where sequences are dealt to lanes (micro-batches of a pipeline, data parallel
ranks that share experts), tokens and sequences are those of the fullest lane, and a step is one turn of all.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from kvsim.cost.calibrated import (
    CalibratedGemm,
    PrefillTable,
    calibrated_gemm,
    prefill_tables,
    summed_table,
)
from kvsim.cost.collectives import StepCommunication
from kvsim.cost.estimator import PricedGemm, prefill_attention_seconds, price_gemm, query_key_pairs
from kvsim.cost.kernels import Kernel
from kvsim.cost.linear import linear_kernels
from kvsim.cost.projection import ClassKernels, attention_kernels
from kvsim.cost.rates import Rates
from kvsim.cost.sampling import SamplingPrice
from kvsim.cost.sequence import SequenceModel, ops_seconds
from kvsim.cost.shapes import Gemm, forward_gemms, lm_head
from kvsim.deployment import Deployment, LayerClass
from kvsim.ops import Numeric, OpCall
from kvsim.specs.base import DTYPE_BITS, Dtype
from kvsim.specs.model import LayerKind

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
    """Prefill attention of one layer class over a chunk: FLOPs per query-key pair, and reading the cached context.

    A fitted kernel's table takes the place of both; ``context_unpack_s`` remains where the kernel reads plain KV only.
    """

    layers: int
    flops_per_pair: float
    window_tokens: int | None
    context_read_s: float
    context_unpack_s: float
    table: PrefillTable | None = None


class StepModel:
    """Prices the steps of one deployment at one edge of the priors."""

    def __init__(self, deployment: Deployment, rates: Rates) -> None:
        if deployment.engine_fit is not None:
            rates = _fitted_as_a_whole(deployment.engine_fit.applied(rates, ELEMENTWISE_KERNELS_PER_LAYER))
        self.deployment = deployment
        self.rates = rates
        self.sequences = SequenceModel(deployment, rates)
        model, parallel = deployment.model, deployment.parallelism
        ranks = parallel.tensor
        self._stretch = parallel.turn_stretch(model.num_layers)
        linear = linear_kernels(deployment)
        compute = model.weight_dtype if rates.device.supports(model.weight_dtype) else Dtype.BF16
        self.gemms = tuple(
            _priced(gemm, linear.of(gemm), rates, model.weight_bits, compute)
            for gemm in forward_gemms(model, ranks, data_ranks=parallel.data, expert_parallel=parallel.expert)
        )
        # Dense products of fitted kernels share their nodes, so one table sums them all.
        self._dense = summed_table(tuple((g.gemm.count, g.table) for g in self.gemms if isinstance(g, CalibratedGemm)))
        self._other_gemms = tuple(g for g in self.gemms if not isinstance(g, CalibratedGemm))
        self.head = _priced(lm_head(model, ranks), linear.head, rates, 16.0, Dtype.BF16)
        kinds = [group.kind for group in model.groups for _ in group.layers]
        self._launches = sum(kind not in NO_ATTENTION for kind in kinds)
        self.communication = StepCommunication(deployment, rates)
        self.sampling = SamplingPrice(deployment, rates)
        self._hidden_bytes = model.hidden_size * DTYPE_BITS[model.dtype] / 8
        self._overhead_s, self._overhead_s_per_row = self._elementwise(len(kinds))
        self._max_captured = min(2 * deployment.engine.max_num_seqs, MAX_CAPTURED_TOKENS)
        covered, self._fitted_launch_s, self._fitted_s_per_sequence = self._fitted_floor()
        self._launches -= covered
        self._prefill_terms = tuple(
            self._prefill_term(c, kernels)
            for c, kernels in zip(deployment.layer_classes, attention_kernels(deployment), strict=True)
        )
        append_launch_s, append_s_per_token = self._ops_split(_append_ops(deployment))
        self.append_launch_s = append_launch_s * self._stretch
        self.append_s_per_token = append_s_per_token * self._stretch
        decode_launch_s, decode_s_per_sequence = self._ops_split(_decode_ops(deployment))
        self._decode_launch_s = decode_launch_s * self._stretch
        self._decode_s_per_sequence = decode_s_per_sequence * self._stretch

    def _fitted_floor(self) -> tuple[int, float, float]:
        """Decode attention of fitted kernels whatever the context: (layers, launches, seconds per sequence)."""
        covered, launch_s, per_sequence_s = 0, 0.0, 0.0
        for layer_class, kernels in zip(self.deployment.layer_classes, attention_kernels(self.deployment), strict=True):
            if kernels.floor is not None:
                layers = group_layers(layer_class)
                covered += layers
                launch_s += layers * kernels.floor.launch_s(self.rates.edge)
                per_sequence_s += layers * kernels.floor.per_sequence_s(self.rates.edge)
        return covered, launch_s, per_sequence_s

    def _elementwise(self, layers: int) -> tuple[float, float]:
        """Norms, RoPE and activations of a step: (launches, per row)."""
        model, rates = self.deployment.model, self.rates
        width = model.intermediate_size or (model.moe.moe_intermediate_size if model.moe else model.hidden_size)
        width_bytes = width / self.deployment.tensor_parallel_size * DTYPE_BITS[model.dtype] / 8
        moved_bytes = self._hidden_bytes * (3 * 2) + width_bytes * 3
        launch_s = ELEMENTWISE_KERNELS_PER_LAYER * rates.elementwise_launch_s
        if not self.deployment.engine.cuda_graphs:
            launch_s += KERNELS_PER_LAYER * rates.uncaptured_launch_s
        routing_s = len(model.moe.layers) * rates.moe_layer_s if model.moe else 0.0
        return layers * launch_s + routing_s, layers * moved_bytes / rates.stream_bytes_per_s

    def padded(self, tokens: Numeric) -> Numeric:
        """Rows that the linear layers really process."""
        return captured_size(tokens, self._max_captured) if self.deployment.engine.cuda_graphs else tokens

    def token_terms(self, tokens: Numeric) -> StepTerms:
        """Parts of a step that depend on how many tokens it processes (zero tokens cost nothing)."""
        rows = self.padded(tokens)
        weights = sum((gemm.seconds(rows) for gemm in self._other_gemms), start=0.0 * rows)
        if self._dense is not None:
            weights = weights + self._dense(rows)
        overhead = self._overhead_s + rows * self._overhead_s_per_row
        return StepTerms(
            _if_any(tokens, weights * self._stretch),
            _if_any(tokens, self.communication.token_seconds(rows)),
            _if_any(tokens, overhead * self._stretch),
        )

    def head_seconds(self, sampled: Numeric) -> Numeric:
        """LM head for ``sampled`` sequences of a lane.

        Where stages have equal layers the last one has the head besides and sets the pace of all.
        """
        parallel = self.deployment.parallelism
        paced = parallel.pipeline if self.deployment.model.num_layers % parallel.pipeline == 0 else 1
        return _if_any(sampled, paced * self.head.seconds(sampled))

    def gather_seconds(self, sampled: Numeric) -> Numeric:
        """Gathering the logits of ``sampled`` sequences of a lane over tensor-parallel ranks."""
        return _if_any(sampled, self.communication.sampled_seconds(sampled))

    def sampling_seconds(self, sampled: Numeric) -> Numeric:
        """Drawing the tokens of ``sampled`` sequences of a lane."""
        return _if_any(sampled, self.sampling.seconds(sampled))

    def host_step_seconds(self, sequences: Numeric) -> Numeric:
        """Host work of a step of ``sequences`` that synchronous scheduling leaves uncovered; no part of any other term.

        Who schedules decides whether it counts: asynchronous scheduling hides it behind the step before.
        """
        seconds = self.rates.host_step_s + sequences * self.rates.host_step_per_sequence_s
        return _if_any(sequences, seconds)

    def decode_fixed_seconds(self, sequences: Numeric) -> tuple[Numeric, Numeric]:
        """(attention, compression) of a decode batch that does not grow with context."""
        attention = self._launches * (self.rates.attention_launch_s + sequences * self.rates.attention_per_sequence_s)
        attention = attention + (self._fitted_launch_s + sequences * self._fitted_s_per_sequence)
        attention = attention + self._state_seconds(sequences)
        compression = (
            self._decode_launch_s
            + self.append_launch_s
            + sequences * (self._decode_s_per_sequence + self.append_s_per_token)
        )
        return _if_any(sequences, attention * self._stretch), _if_any(sequences, compression)

    def _state_seconds(self, sequences: Numeric) -> Numeric:
        """Linear layers read and write each sequence's recurrent state once a step."""
        return 2.0 * self.deployment.state_bytes_per_sequence / self.rates.stream_bytes_per_s * sequences

    def prefill_attention_seconds(self, chunk_tokens: Numeric, context_tokens: int) -> tuple[Numeric, Numeric]:
        """(attention, unpacking) of one chunk of ``chunk_tokens`` after ``context_tokens`` already cached."""
        attention: Numeric = 0.0
        unpack: Numeric = 0.0
        for term in self._prefill_terms:
            read_tokens = context_tokens if term.window_tokens is None else min(context_tokens, term.window_tokens)
            unpack += term.layers * read_tokens * term.context_unpack_s
            if term.table is not None:
                attention += term.layers * term.table(chunk_tokens, context_tokens)
                continue
            pairs = query_key_pairs(chunk_tokens, context_tokens, term.window_tokens)
            computed_s = prefill_attention_seconds(chunk_tokens, pairs, term.flops_per_pair, self.rates)
            attention += term.layers * (computed_s + read_tokens * term.context_read_s)
        return attention * self._stretch, unpack * self._stretch

    def _prefill_term(self, layer_class: LayerClass, kernels: ClassKernels) -> PrefillTerm:
        group, model = layer_class.group, self.deployment.model
        heads = model.num_attention_heads / self.deployment.tensor_parallel_size
        key_dim, value_dim = group.k_head_dim, group.v_head_dim or group.k_head_dim
        if group.is_latent and model.mla is not None:
            # Prefill runs MLA un-absorbed, on per-head keys and values.
            key_dim = model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim
            value_dim = model.mla.v_head_dim
        encoding = layer_class.prefill_encoding
        stored = encoding.read_bytes_per_token(group, model.dtype) * layer_class.rank_share
        family = encoding.unpack_family
        unpack_s = 0.0
        if family is not None:
            elements = encoding.stored_elements_per_token(group) * layer_class.rank_share
            unpack_s = elements / self.rates.unpack_elements_per_s(family)
        kernel = kernels.prefill or kernels.native_prefill
        return PrefillTerm(
            layers=group_layers(layer_class),
            flops_per_pair=2.0 * heads * (key_dim + value_dim),
            window_tokens=group.window_tokens if group.kind is not LayerKind.INDEXED else None,
            context_read_s=stored / self.rates.stream_bytes_per_s,
            context_unpack_s=unpack_s if kernels.prefill is None else 0.0,
            table=prefill_tables(kernel, kernels.shape)[self.rates.edge] if kernel and kernels.shape else None,
        )

    def _ops_split(self, ops: tuple[OpCall, ...]) -> tuple[float, float]:
        launch_s = sum(call.count * call.work.launches for call in ops) * self.rates.elementwise_launch_s
        whole_s = ops_seconds(ops, self.deployment.tensor_parallel_size, self.rates)
        return launch_s, whole_s - launch_s


def _priced(
    gemm: Gemm, kernel: Kernel | None, rates: Rates, weight_bits: float, compute: Dtype
) -> PricedGemm | CalibratedGemm:
    """Price a product by its fitted kernel, or by the datasheet where it has none."""
    if kernel is not None:
        return calibrated_gemm(gemm, kernel, rates.edge, weight_bits=weight_bits)
    return price_gemm(gemm, rates, weight_bits=weight_bits, compute=compute)


def _fitted_as_a_whole(rates: Rates) -> Rates:
    """Experts under an engine-level fit: it has launches and routing in it, and reads them like other weights."""
    return replace(
        rates,
        grouped_bytes_per_s=rates.weight_bytes_per_s,
        grouped_launch_s=rates.gemm_launch_s,
        grouped_tile_rows=1.0,
        moe_layer_s=0.0,
    )


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
