"""Walsh-Hadamard transform in plain torch, by the matrix."""

import math

import torch

from ...formats.turboquant import hadamard


def hadamard_reference(rows: torch.Tensor, signs: torch.Tensor | None = None) -> torch.Tensor:
    """Rotate rows, (num_rows, dim), by Hadamard(dim) diag(signs) / sqrt(dim) in fp32."""
    dim = rows.shape[-1]
    signed = rows.float() if signs is None else rows.float() * signs
    return signed @ hadamard(dim, str(rows.device)) / math.sqrt(dim)
