"""Integers in groups with an fp16 scale and zero point: of channels of one token, or of tokens of one channel."""

from __future__ import annotations

from math import ceil
from typing import Final

import numpy as np

from kvsim.compression.base import KvBytes
from kvsim.compression.encoding.tensor_codec import StoredTensor, codes_out_of_blocks, in_blocks, out_of_blocks
from kvsim.numerics.arrays import CodeArray
from kvsim.numerics.uniform import quantise_range
from kvsim.tensors import FloatArray

_SCALE_AND_ZERO_BITS: Final = 32


def token_group_bytes(dim: int, bits: int, group_size: int) -> KvBytes:
    """Bytes of one vector in groups of ``group_size`` of its channels, the last one smaller; codes on whole bytes."""
    return KvBytes(float(ceil(dim * bits / 8)), _SCALE_AND_ZERO_BITS / 8 * ceil(dim / group_size))


def channel_group_bytes(dim: int, bits: int, group_size: int) -> KvBytes:
    """Bytes of one vector's share in groups of ``group_size`` tokens of one channel, once they are full."""
    return KvBytes(dim * bits / 8, _SCALE_AND_ZERO_BITS / 8 * dim / group_size)


def store_token_groups(vectors: FloatArray, bits: int, group_size: int) -> StoredTensor:
    """Store vectors, (H, n, D), in groups of ``group_size`` channels of one token; rows of codes end on whole bytes."""
    dim = vectors.shape[-1]
    read_back, codes, num_groups = _quantise(vectors, bits, group_size)
    payload_bits = 8.0 * ceil(dim * bits / 8) * (vectors.size // dim)
    return StoredTensor(read_back, payload_bits, float(_SCALE_AND_ZERO_BITS * num_groups), codes, 2**bits)


def store_channel_groups(vectors: FloatArray, bits: int, group_size: int) -> StoredTensor:
    """Store vectors, (H, n, D), in groups of ``group_size`` neighbouring tokens of one channel.

    What is left over at the end is a smaller group with a scale of its own. (An engine would wait for the group to
    fill, and keep those tokens native until then.)
    """
    by_channel = np.ascontiguousarray(vectors.swapaxes(1, 2))
    read_back, codes, num_groups = _quantise(by_channel, bits, group_size)
    return StoredTensor(
        vectors=np.ascontiguousarray(read_back.swapaxes(1, 2)),
        payload_bits=float(vectors.size * bits),
        metadata_bits=float(_SCALE_AND_ZERO_BITS * num_groups),
        codes=np.ascontiguousarray(codes.swapaxes(1, 2)),
        levels=2**bits,
    )


def _quantise(rows: FloatArray, bits: int, group_size: int) -> tuple[FloatArray, CodeArray, int]:
    """Quantise groups along the last axis; give what is read back, the codes, and how many groups there are."""
    length = rows.shape[-1]
    made = quantise_range(in_blocks(rows, group_size), bits)
    return out_of_blocks(made.read_back(), length), codes_out_of_blocks(made.codes, length), made.scale.size
