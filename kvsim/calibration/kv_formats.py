"""Bytes of one stored element of K or V, by the name that timings give its format."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Final

from kvsim.compression import parse_compression
from kvsim.errors import InvalidSpec, UnknownName
from kvsim.specs.base import Dtype
from kvsim.specs.model import LayerGroup, LayerKind

DTYPE_BYTES: Final[Mapping[str, float]] = {
    "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "native": 2.0, "fp8_e4m3": 1.0,
    "mla": 2.0, "mla_fp8_e4m3": 1.0,
}  # fmt: skip
"""Plain dtypes, and kvsim's kernels over them (their own names, MLA's latent included)."""
HEAD_DIM: Final = 128
"""Head size that formats with scales are counted at; at 64 they take a few percent more per element."""


@lru_cache(maxsize=64)
def bytes_per_element(kv_dtype: str) -> float:
    """Bytes of one element, its share of scales included.

    Parameters
    ----------
    kv_dtype : str
        A dtype, or the name of one of kvsim's encodings, such as ``kivi-4``.

    Raises
    ------
    KeyError
        The format is not known.
    """
    if kv_dtype in DTYPE_BYTES:
        return DTYPE_BYTES[kv_dtype]
    try:
        encoding = parse_compression(kv_dtype).stored
    except (UnknownName, InvalidSpec):
        raise KeyError(kv_dtype) from None
    group = LayerGroup(kind=LayerKind.FULL, layers=(0,), num_kv_heads=1, k_head_dim=HEAD_DIM, v_head_dim=HEAD_DIM)
    return encoding.bytes_per_token(group, Dtype.BF16).total_bytes / group.kv_elements_per_token


def is_known(kv_dtype: str) -> bool:
    """Whether the bytes of a format are known; an operation without KV (``""``) needs none."""
    try:
        return not kv_dtype or bytes_per_element(kv_dtype) > 0
    except KeyError:
        return False
