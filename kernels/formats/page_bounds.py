"""Channel-wise bounds of the keys of each page: Quest's metadata (arXiv 2406.10774)."""

import math

import torch

from .pages import Field, PageLayout


def page_bounds_layout(*, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> PageLayout:
    """Give the fields of a page's bounds, both (num_kv_heads, head_dim) in the model's dtype.

    A pool of them lies beside the pool of keys and values, and the block table indexes both: 2 * num_kv_heads *
    head_dim * e bytes per page, whatever the page holds.
    """
    shape = (num_kv_heads, head_dim)
    return PageLayout((Field("key_min", dtype, shape), Field("key_max", dtype, shape)))


def page_bounds(keys: torch.Tensor, used: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute the bounds of whole pages.

    Parameters
    ----------
    keys : Tensor, (num_pages, page_size, num_kv_heads, head_dim)
    used : Tensor of bool, (num_pages, page_size)
        Rows that hold a token; a page without any has +inf as its minimum and -inf as its maximum.

    Returns
    -------
    dict of Tensor, (num_pages, num_kv_heads, head_dim)
        ``key_min`` and ``key_max``, exact.
    """
    unused = ~used[:, :, None, None]
    return {
        "key_min": keys.masked_fill(unused, math.inf).amin(1),
        "key_max": keys.masked_fill(unused, -math.inf).amax(1),
    }
