"""Caches with known statistics, and small codecs to place against the limits."""

from __future__ import annotations

import numpy as np

from kvsim.tensors import KvTensors, LayerKv


def gaussian_cache(
    variances: np.ndarray | None = None,
    *,
    seed: int = 0,
    layers: int = 1,
    heads: int = 2,
    tokens: int = 2048,
    head_dim: int = 32,
    mean: float = 0.0,
) -> KvTensors:
    """Independent tokens; channels of these variances, turned by a random rotation that all heads share."""
    rng = np.random.default_rng(seed)
    scales = np.sqrt(np.ones(head_dim) if variances is None else np.asarray(variances, dtype=np.float64))
    turn = np.linalg.qr(np.random.default_rng(7).standard_normal((head_dim, head_dim)))[0]

    def draw(count: int) -> np.ndarray:
        return ((rng.standard_normal((count, tokens, head_dim)) * scales + mean) @ turn).astype(np.float32)

    positions = np.broadcast_to(np.arange(tokens), (heads, tokens)).copy()
    empty = np.zeros((heads, 0, head_dim), dtype=np.float32)
    made = tuple(LayerKv(draw(heads), draw(heads), positions, empty, empty) for _ in range(layers))
    return KvTensors(made, None, head_dim**-0.5, f"Gaussian, seed {seed}")
