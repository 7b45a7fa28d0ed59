"""Work: how many FLOPs an operation needs, what it reads and writes, and how many elements it must decode.

Facts about the model and the format, not about a device: one pure function per operation. Counts may be numbers or
numpy arrays over batch sizes, so that a whole table is priced at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from kvsim.specs.base import Dtype

Numeric = float | npt.NDArray[np.float64]


class Component(StrEnum):
    """What a second of engine time is spent on; the report's time split."""

    WEIGHTS = "weights"
    ATTENTION = "attention"
    COMPRESSION = "compression"
    COMMUNICATION = "communication"
    OVERHEAD = "overhead"


@dataclass(frozen=True, slots=True)
class Work:
    """What one kernel moves and computes.

    ``flops`` run on the tensor units in ``dtype``; ``vector_flops`` on the vector units; ``decoded_elements`` are
    values unpacked from a compressed format by the method named ``unpack_family``.
    """

    flops: Numeric = 0.0
    bytes_read: Numeric = 0.0
    bytes_written: Numeric = 0.0
    vector_flops: Numeric = 0.0
    decoded_elements: Numeric = 0.0
    unpack_family: str | None = None
    dtype: Dtype = Dtype.BF16
    launches: float = 1.0

    def scaled(self, share: float) -> Work:
        """Give a share of the work, launches included: what is done now and then, per step."""
        return replace(
            self,
            flops=self.flops * share,
            bytes_read=self.bytes_read * share,
            bytes_written=self.bytes_written * share,
            vector_flops=self.vector_flops * share,
            decoded_elements=self.decoded_elements * share,
            launches=self.launches * share,
        )


@dataclass(frozen=True, slots=True)
class OpCall:
    """A named operation with its work, and what the time counts as."""

    name: str
    work: Work
    component: Component
    count: int = 1
    """How often it runs (layers)."""


def quantize(elements: float, input_bytes: float, output_bytes: float, *, flops_per_element: float = 4.0) -> Work:
    """Quantise-on-write of ``elements`` values: absmax or min/max, scale, round, pack.

    Reads ``input_bytes`` of the native KV, writes ``output_bytes`` of codes and scales.
    """
    return Work(bytes_read=input_bytes, bytes_written=output_bytes, vector_flops=flops_per_element * elements)


def score_with_window(
    context_tokens: float,
    window_tokens: int,
    num_attention_heads: int,
    num_kv_heads: int,
    head_dim: int,
    element_bytes: float,
) -> Work:
    """Attention of the last ``window_tokens`` queries to all keys, pooled (SnapKV, arXiv 2404.14469)."""
    return Work(
        flops=2.0 * window_tokens * context_tokens * head_dim * num_attention_heads,
        bytes_read=context_tokens * num_kv_heads * head_dim * element_bytes,
        bytes_written=context_tokens * num_kv_heads * 4.0,
        vector_flops=5.0 * window_tokens * context_tokens * num_attention_heads,
    )


def select_top_k(context_tokens: float, num_kv_heads: int) -> Work:
    """Radix-style top-k over fp32 scores: four passes over the scores."""
    scores_bytes = context_tokens * num_kv_heads * 4.0
    return Work(bytes_read=4.0 * scores_bytes, bytes_written=scores_bytes, launches=4.0)


def compact(kept_tokens: float, bytes_per_token: float) -> Work:
    """Gather kept tokens into new pages: read and write each once."""
    size_bytes = kept_tokens * bytes_per_token
    return Work(bytes_read=size_bytes, bytes_written=size_bytes)


def project_rows(rows: float, in_features: int, out_features: int, element_bytes: float) -> Work:
    """Multiply ``rows`` vectors by an in_features x out_features matrix that every row of the launch shares.

    The matrix (32 KiB for a 128 x 128 Hadamard, under 1 MiB for a low-rank factor) stays in cache: its bytes are left
    out, so the work is linear in rows.
    """
    return Work(
        flops=2.0 * rows * in_features * out_features,
        bytes_read=rows * in_features * element_bytes,
        bytes_written=rows * out_features * element_bytes,
    )


def fast_hadamard(rows: float, dim: int, element_bytes: float) -> Work:
    """Turn ``rows`` vectors by a Hadamard matrix in ``log2 dim`` rounds of additions on the vector units."""
    size_bytes = rows * dim * element_bytes
    return Work(bytes_read=size_bytes, bytes_written=size_bytes, vector_flops=rows * dim * math.log2(max(2, dim)))


def channel_energy(tokens: float, channels: float, element_bytes: float) -> Work:
    """Sum of squares of each channel over a prompt's tokens (TurboQuant's choice of outlier channels)."""
    return Work(
        bytes_read=tokens * channels * element_bytes, bytes_written=channels * 4.0, vector_flops=2.0 * tokens * channels
    )


def pool_scores(context_tokens: float, num_kv_heads: int, kernel_size: int) -> Work:
    """Smooth fp32 scores over neighbouring tokens (SnapKV's pooling): one add per kernel position."""
    scores_bytes = context_tokens * num_kv_heads * 4.0
    return Work(
        bytes_read=scores_bytes,
        bytes_written=scores_bytes,
        vector_flops=context_tokens * num_kv_heads * kernel_size,
    )


def accumulate_attention(
    context_tokens: float, num_attention_heads: int, num_kv_heads: int, head_dim: int, element_bytes: float
) -> Work:
    """Sum of the causal attention that each prompt token receives (H2O, arXiv 2306.14048).

    A fused attention kernel never holds the probabilities, so QK^T of n²/2 pairs is computed again: n²·D·Hq FLOPs
    on the tensor units and 5 vector FLOPs per pair (scale, subtract the stored maximum, exp, normalise, add).
    """
    pairs = 0.5 * context_tokens * context_tokens * num_attention_heads
    return Work(
        flops=2.0 * pairs * head_dim,
        bytes_read=context_tokens * (num_attention_heads + num_kv_heads) * head_dim * element_bytes,
        bytes_written=context_tokens * num_kv_heads * 4.0,
        vector_flops=5.0 * pairs,
    )


def score_keys(context_tokens: float, num_kv_heads: int, head_dim: int, element_bytes: float) -> Work:
    """One number per key: its norm (Knorm, arXiv 2406.11430) or a product with a fixed vector (arXiv 2503.02812)."""
    elements = context_tokens * num_kv_heads * head_dim
    return Work(
        bytes_read=elements * element_bytes,
        bytes_written=context_tokens * num_kv_heads * 4.0,
        vector_flops=2.0 * elements,
    )


def score_key_directions(context_tokens: float, num_kv_heads: int, head_dim: int, element_bytes: float) -> Work:
    """Cosine of each key with the mean direction of all (KeyDiff, arXiv 2504.15364).

    Two passes over the keys, each with a norm: the first adds directions up, the second takes products with the sum.
    """
    elements = context_tokens * num_kv_heads * head_dim
    return Work(
        bytes_read=2.0 * elements * element_bytes,
        bytes_written=context_tokens * num_kv_heads * 4.0,
        vector_flops=8.0 * elements,
        launches=2.0,
    )


def query_statistics(
    prompt_tokens: float, num_attention_heads: int, head_dim: int, element_bytes: float, *, with_covariance: bool
) -> Work:
    """Mean of each query head's queries, and their covariance: a D x D product over tokens (arXiv 2510.00636)."""
    elements = prompt_tokens * num_attention_heads * head_dim
    return Work(
        flops=2.0 * elements * head_dim if with_covariance else 0.0,
        bytes_read=elements * element_bytes,
        bytes_written=num_attention_heads * head_dim * (1.0 + (head_dim if with_covariance else 0.0)) * element_bytes,
        vector_flops=elements,
    )


def score_expected_attention(
    context_tokens: float,
    num_attention_heads: int,
    num_kv_heads: int,
    k_head_dim: int,
    v_head_dim: int,
    element_bytes: float,
    *,
    with_covariance: bool,
) -> Work:
    """Mean weight of each token under Gaussian queries, times the length of its value (arXiv 2510.00636).

    Per query head and key a product with the mean and, with covariances, one with a D x D matrix and a second with the
    key; then the softmax over tokens. Logits of all query heads are written and read between the two launches.
    """
    pairs = context_tokens * num_attention_heads
    width = k_head_dim + 2.0 if with_covariance else 1.0
    key_and_value = context_tokens * num_kv_heads * (k_head_dim + v_head_dim) * element_bytes
    return Work(
        flops=2.0 * pairs * k_head_dim * width,
        bytes_read=key_and_value + 4.0 * pairs,
        bytes_written=4.0 * pairs + 4.0 * context_tokens * num_kv_heads,
        vector_flops=5.0 * pairs + 2.0 * context_tokens * num_kv_heads * v_head_dim,
        launches=2.0,
    )


def draw_scores(context_tokens: float, num_kv_heads: int) -> Work:
    """Draw a random number per token and KV head."""
    scores = context_tokens * num_kv_heads
    return Work(bytes_written=4.0 * scores, vector_flops=10.0 * scores)


def average_chunks(context_tokens: float, num_kv_heads: int) -> Work:
    """Mean of fp32 scores over the tokens of each chunk and all heads (ChunkKV, arXiv 2502.00299)."""
    scores = context_tokens * num_kv_heads
    return Work(bytes_read=4.0 * scores, vector_flops=scores)


def score_lag_relative(
    context_tokens: float, num_kv_heads: int, channels: int, lag_size: int, element_bytes: float
) -> Work:
    """Spread of each K and V within the range of the next ``lag_size`` tokens (LagKV, arXiv 2504.04704).

    Per element two comparisons for the range, a shift and a scaling into it, and a sum and a sum of squares.
    """
    scores = context_tokens * num_kv_heads
    return Work(
        bytes_read=2.0 * scores * channels * element_bytes,
        bytes_written=4.0 * scores,
        # Softmax and rank within a part, for K and for V.
        vector_flops=7.0 * scores * channels + 2.0 * scores * (5.0 + math.log2(max(2, lag_size))),
        launches=2.0,
    )


def score_leverage(context_tokens: float, num_kv_heads: int, channels: int, element_bytes: float) -> Work:
    """Squared length of each K and V as a share of its neighbours' (CurDKV, arXiv 2509.15038)."""
    scores = context_tokens * num_kv_heads
    return Work(
        bytes_read=scores * channels * element_bytes,
        bytes_written=4.0 * scores,
        vector_flops=2.0 * scores * channels + 6.0 * scores,
    )


def page_bounds(tokens: float, page_size: int, num_kv_heads: int, head_dim: int, element_bytes: float) -> Work:
    """Channel-wise minimum and maximum of the keys of each page (Quest, arXiv 2406.10774)."""
    keys_bytes = tokens * num_kv_heads * head_dim * element_bytes
    return Work(
        bytes_read=keys_bytes,
        bytes_written=2.0 * keys_bytes / page_size,
        vector_flops=2.0 * tokens * num_kv_heads * head_dim,
    )


def expand_in_own_basis(
    rows: float, in_features: int, out_features: int, element_bytes: float, *, basis_reads: float = 1.0
) -> Work:
    """As `project_rows`, with a matrix that belongs to one sequence: no other row of the batch shares its bytes.

    ``basis_reads``: how often the step reads all of the matrix.
    """
    matrix_bytes = in_features * out_features * element_bytes
    return Work(
        flops=2.0 * rows * in_features * out_features,
        bytes_read=rows * in_features * element_bytes + basis_reads * matrix_bytes,
        bytes_written=rows * out_features * element_bytes,
    )


def randomised_svd(rows: float, columns: int, rank: int, power_iterations: int, element_bytes: float) -> Work:
    """Leading ``rank`` right singular vectors of a rows x columns matrix by sketching (arXiv 0909.4061).

    2·rows·columns·rank FLOPs for the sketch, for each half of a power iteration and for the last product; every tall
    factor is made orthonormal by its Gram matrix and a triangular solve (Cholesky QR, 3·length·rank² FLOPs); the small
    factor takes 4·columns·rank² for its Gram matrix and the vectors, and 9·rank³ for the symmetric eigenproblem. The
    matrix is read once per product. Coordinates of the rows are not in it.
    """
    rank = int(min(rank, columns, rows))
    products = 2 + 2 * power_iterations
    orthonormal = 3.0 * rank * rank * ((1 + power_iterations) * rows + power_iterations * columns)
    small = 4.0 * columns * rank * rank + 9.0 * rank**3
    factors = (1 + power_iterations) * (rows + columns) * rank * element_bytes
    return Work(
        flops=2.0 * products * rows * columns * rank + orthonormal + small,
        bytes_read=products * rows * columns * element_bytes + 3.0 * factors,
        bytes_written=2.0 * factors,
        launches=float(3 * products),
    )


def score_channels(
    context_tokens: float,
    window_tokens: int,
    num_attention_heads: int,
    num_kv_heads: int,
    head_dim: int,
    element_bytes: float,
) -> Work:
    """Mean square of every key channel, and of the last ``window_tokens`` queries' (ThinK, arXiv 2407.21018)."""
    elements = (context_tokens * num_kv_heads + window_tokens * num_attention_heads) * head_dim
    return Work(
        bytes_read=elements * element_bytes,
        bytes_written=num_kv_heads * head_dim * 4.0,
        vector_flops=2.0 * elements,
    )


def gather_channels(rows: float, head_dim: int, kept_channels: int, element_bytes: float) -> Work:
    """Copy ``kept_channels`` of each of ``rows`` vectors."""
    return Work(bytes_read=rows * head_dim * element_bytes, bytes_written=rows * kept_channels * element_bytes)


def merge_directions(tokens: float, num_kv_heads: int, channels: int, element_bytes: float) -> Work:
    """Join two layers' vectors of ``channels`` (K and V together) per head into one direction (arXiv 2405.14366).

    Per channel: two squared norms and a product (6 FLOPs), two scaled vectors added and scaled again (4). Per vector
    two square roots, an arc cosine and two sines, counted as 20 FLOPs each. Four fp16 magnitudes are written.
    """
    vectors = 2.0 * tokens * num_kv_heads
    elements = tokens * num_kv_heads * channels
    return Work(
        bytes_read=2.0 * elements * element_bytes,
        bytes_written=elements * element_bytes + 4.0 * vectors,
        vector_flops=10.0 * elements + 100.0 * vectors,
    )


def nearest_survivors(evicted: float, kept: float, num_kv_heads: int, head_dim: int, element_bytes: float) -> Work:
    """Find the kept key of largest cosine for each evicted one (kernels/select/merge): all pairs, per KV head.

    A product per pair on the tensor units; 3 vector FLOPs to scale, compare and keep it, 2 per channel for norms.
    Written are a place and a cosine per evicted token.
    """
    pairs = evicted * kept * num_kv_heads
    vectors = (evicted + kept) * num_kv_heads
    return Work(
        flops=2.0 * pairs * head_dim,
        bytes_read=vectors * head_dim * element_bytes,
        bytes_written=8.0 * evicted * num_kv_heads,
        vector_flops=3.0 * pairs + 2.0 * vectors * head_dim,
        launches=2.0,
    )


def fold_tokens(evicted: float, kept: float, num_kv_heads: int, channels: int, element_bytes: float) -> Work:
    """Sum evicted vectors of ``channels`` at their survivors, as a product with a matrix of weights, and divide.

    So kernels/select/merge does it: no atomics, the same bits each time, as many products as pairs.
    """
    heads = num_kv_heads
    return Work(
        flops=2.0 * evicted * kept * heads * channels,
        bytes_read=((evicted + kept) * channels * element_bytes + 8.0 * evicted) * heads,
        bytes_written=kept * heads * channels * element_bytes,
        vector_flops=2.0 * kept * heads * channels,
        launches=2.0,
    )


def spread_values(
    evicted: float, kept: float, window: int, num_kv_heads: int, value_dim: int, element_bytes: float
) -> Work:
    """Add each evicted value to the ``window`` kept ones after it (CaM, ICML 2024); scores are read as fp32.

    A banded sum: every value is read once, kept ones are written.
    """
    heads = num_kv_heads
    return Work(
        bytes_read=(evicted + kept) * heads * (value_dim * element_bytes + 4.0),
        bytes_written=kept * heads * value_dim * element_bytes,
        vector_flops=evicted * heads * window * (2.0 * value_dim + 1.0),
    )


def compress_blocks(
    tokens: float, block_size: int, stride: int, num_kv_heads: int, channels: int, element_bytes: float
) -> Work:
    """Make one vector of ``channels`` of each block of ``block_size`` tokens, one per ``stride`` (NSA, 2502.11089).

    The paper's map is an MLP of unstated width; one matrix of block_size x channels to channels is counted.
    """
    made = tokens / stride * num_kv_heads
    return Work(
        flops=2.0 * made * block_size * channels * channels,
        bytes_read=tokens * num_kv_heads * channels * element_bytes,
        bytes_written=made * channels * element_bytes,
    )


def response_profiles(
    entries: float,
    num_queries: float,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int,
    num_features: int,
    element_bytes: float,
) -> Work:
    """Influence of entries on a sample of queries: norms, and sketches of ``num_features`` numbers (arXiv 2607.01520).

    ``num_queries`` are those of all query heads; each meets the entries of its KV head. Products: logits, outputs, the
    values met by outputs (norms), and two sketches. About 10 vector FLOPs per query and entry (scale, subtract, exp,
    normalise, square, weigh). Shares stay on chip; values are read once more for their part of the sketch.
    """
    pairs = num_queries * entries
    rows = entries * num_kv_heads
    return Work(
        flops=2.0 * pairs * (key_dim + 2.0 * value_dim + 2.0 * num_features) + 2.0 * rows * value_dim * num_features,
        bytes_read=rows * (2.0 * key_dim + 3.0 * value_dim) * element_bytes,
        bytes_written=rows * (num_features + 2.0) * 4.0,
        vector_flops=10.0 * pairs,
        launches=3.0,
    )


def cut_clusters(entries: float, num_kv_heads: int, num_features: int, depth: float, power_steps: int) -> Work:
    """Balanced clusters by ``depth`` halvings: each finds a direction by power iteration and sorts along it.

    Per level ``power_steps`` products there and back and one projection, on fp32 sketches that are read each time, and
    a radix sort of four passes over a number and an index.
    """
    rows = entries * num_kv_heads
    products = 2.0 * power_steps + 1.0
    return Work(
        bytes_read=depth * rows * (products * num_features * 4.0 + 4.0 * 8.0),
        bytes_written=depth * rows * 4.0 * 8.0,
        vector_flops=depth * products * 2.0 * rows * num_features,
        launches=depth * (products + 4.0),
    )


def merge_clusters(
    entries: float,
    atoms: float,
    num_queries: float,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int,
    element_bytes: float,
) -> Work:
    """Weighted means of clusters' keys and values, and the weights at which queries give them their members' mass."""
    channels = key_dim + value_dim
    return Work(
        flops=2.0 * num_queries * atoms * key_dim,
        bytes_read=(entries + atoms) * num_kv_heads * channels * element_bytes,
        bytes_written=atoms * num_kv_heads * (channels * element_bytes + 4.0),
        vector_flops=2.0 * entries * num_kv_heads * channels + 5.0 * num_queries * atoms,
        launches=2.0,
    )


def read_again(tokens: float, parameters: float, weight_bytes: float, chunk: int) -> Work:
    """Linear layers of ``tokens`` more tokens; each ``chunk`` reads the weights (KVzip, arXiv 2505.23416)."""
    chunks = math.ceil(tokens / chunk)
    return Work(flops=2.0 * tokens * parameters, bytes_read=chunks * weight_bytes, launches=float(chunks))


def attend_again(
    tokens: float, num_attention_heads: int, token_bytes: float, k_head_dim: int, v_head_dim: int, chunk: int
) -> Work:
    """Attention of a second reading in one layer: each chunk sees the whole prompt, and itself up to each token."""
    chunks = math.ceil(tokens / chunk)
    pairs = tokens * tokens + _pairs_within(tokens, chunk)
    return Work(
        flops=2.0 * num_attention_heads * (k_head_dim + v_head_dim) * pairs,
        bytes_read=chunks * tokens * token_bytes,
        vector_flops=4.0 * num_attention_heads * pairs,
        launches=float(chunks),
    )


def most_attention(
    tokens: float,
    num_attention_heads: int,
    num_kv_heads: int,
    head_dim: int,
    element_bytes: float,
    chunk: int,
    sinks: int,
) -> Work:
    """Largest softmax weight per prompt token from the queries of its chunk's second reading (KVzip's scores).

    Queries meet the keys of the sinks, of their chunk, and of the chunk as read again, all of which are multiplied
    before later ones are masked: 2·D FLOPs per pair, and five vector FLOPs (scale, subtract, exp, normalise, maximum).
    """
    chunks = math.ceil(tokens / chunk)
    whole, rest = divmod(tokens, chunk)
    pairs = num_attention_heads * sum(
        count * size * (sinks + 2.0 * size) for count, size in ((whole, chunk), (1, rest))
    )
    keys = (2.0 * tokens + chunks * sinks) * num_kv_heads
    return Work(
        flops=2.0 * head_dim * pairs,
        bytes_read=(keys + tokens * num_attention_heads) * head_dim * element_bytes,
        bytes_written=tokens * num_kv_heads * 4.0,
        vector_flops=5.0 * pairs,
        launches=float(chunks),
    )


def _pairs_within(tokens: float, chunk: int) -> float:
    """Causal pairs within chunks."""
    whole, rest = divmod(tokens, chunk)
    return whole * chunk * (chunk + 1) / 2 + rest * (rest + 1) / 2


def predict_scores(tokens: float, hidden_size: int, num_kv_heads: int, width: int | None, element_bytes: float) -> Work:
    """Scores of ``tokens`` hidden states, one per KV head: an affine map, or through ``width`` GELU units (KVzap).

    The maps lie with the model's weights and every row of a launch shares them: their bytes are left out.
    """
    flops = 2.0 * hidden_size * num_kv_heads if width is None else 2.0 * width * (hidden_size + num_kv_heads)
    return Work(
        flops=tokens * flops,
        bytes_read=tokens * hidden_size * element_bytes,
        bytes_written=tokens * num_kv_heads * 4.0,
        vector_flops=tokens * ((8.0 * width if width else 0.0) + num_kv_heads),
        launches=1.0 if width is None else 2.0,
    )
