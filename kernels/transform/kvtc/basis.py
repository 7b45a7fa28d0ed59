"""Fit the transform: mean, principal components, bits and steps, from sample rows."""

from dataclasses import dataclass

import torch

from .bit_allocation import allocate_bits

CLIP_DEVIATIONS = {1: 1.0, 2: 1.75, 3: 2.5, 4: 3.0, 5: 3.6, 6: 4.1, 7: 4.5, 8: 5.0}
"""Half the range of a uniform quantiser in standard deviations, near the least error for a normal variable."""


@dataclass(frozen=True)
class Transform:
    """An orthogonal transform with a quantiser per component; components without bits are dropped.

    Attributes
    ----------
    mean : Tensor, (num_channels,)
    basis : Tensor, (num_channels, num_components)
        Orthonormal columns.
    step : Tensor, (num_components,)
    levels : Tensor of int32, (num_components,)
        Number of codes; code ``levels / 2`` is the first at or above zero.
    bits : tuple of int
    """

    mean: torch.Tensor
    basis: torch.Tensor
    step: torch.Tensor
    levels: torch.Tensor
    bits: tuple[int, ...]

    @property
    def bits_per_channel(self) -> float:
        """Mean bits per channel of a row before entropy coding."""
        return sum(self.bits) / len(self.mean)


def split_bits(variances: torch.Tensor, bits_per_channel: float) -> tuple[int, ...]:
    """Give the bits of the components that get any, most variance first; at least one component."""
    bits = allocate_bits(variances.tolist(), round(bits_per_channel * len(variances)))
    return tuple(count for count in bits if count) or (1,)


def make_transform(
    mean: torch.Tensor, vectors: torch.Tensor, variances: torch.Tensor, bits_per_channel: float
) -> Transform:
    """Build a transform from principal vectors (columns) and their variances in falling order."""
    bits = split_bits(variances, bits_per_channel)
    kept = len(bits)
    clip = torch.tensor([CLIP_DEVIATIONS[count] for count in bits], device=vectors.device)
    levels = torch.tensor([1 << count for count in bits], dtype=torch.int32, device=vectors.device)
    step = 2 * clip * variances[:kept].float().sqrt() / levels
    return Transform(mean.float(), vectors[:, :kept].float().contiguous(), step.clamp_min(1e-12), levels, bits)


def fit_transform(rows: torch.Tensor, bits_per_channel: float) -> Transform:
    """Fit to sample `rows`, (num_rows, num_channels), several times more rows than channels."""
    mean = rows.double().mean(0)
    covariance = (rows.double() - mean).T @ (rows.double() - mean) / len(rows)
    variances, vectors = torch.linalg.eigh(covariance)
    return make_transform(mean, vectors.flip(1), variances.flip(0).clamp_min(0), bits_per_channel)
