"""Work of encodings and reductions: what a token is turned into before it is stored."""

from __future__ import annotations

import math

from kvsim.ops.work import Work


def quantize(elements: float, input_bytes: float, output_bytes: float, *, flops_per_element: float = 4.0) -> Work:
    """Quantise-on-write of ``elements`` values: absmax or min/max, scale, round, pack.

    Reads ``input_bytes`` of the native KV, writes ``output_bytes`` of codes and scales.
    """
    return Work(bytes_read=input_bytes, bytes_written=output_bytes, vector_flops=flops_per_element * elements)


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
