"""Rows times a matrix in plain torch."""

import torch


def dense_rotation_reference(rows: torch.Tensor, matrix: torch.Tensor, scale: float) -> torch.Tensor:
    """Give ``scale * matrix @ row`` of each row, (num_rows, dim), in fp32."""
    return rows.float() @ matrix.float().T * scale
