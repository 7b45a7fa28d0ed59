"""Sums of exponentials as decode attention leaves them, drawn for checks and timings of kernels that take them."""

import math

import torch

from ..decode_attention.batch import DecodeBatch

LSE_SPLITS = 4


def draw_lse(case: DecodeBatch, *, seed: int, device: str) -> torch.Tensor:
    """Draw log2-sum-exp2 per split, (batch, num_query_heads, splits), about as large as N(0, 1) logits make them.

    The last split saw no token, and neither did any split of a request without tokens: -inf.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = (len(case.context_lens), case.num_query_heads, LSE_SPLITS)
    noise = 0.3 * torch.randn(shape, generator=generator, device=device)
    tokens = torch.tensor(case.context_lens, device=device).view(-1, 1, 1)
    lse = (tokens / (LSE_SPLITS - 1)).log2() + 0.5 * math.log2(math.e) + noise
    lse[..., -1] = -math.inf
    return lse
