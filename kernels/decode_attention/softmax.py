"""Triton pieces of a split-KV attention kernel: the split's range, block ids one tile ahead, one softmax step."""

import triton
import triton.language as tl


@triton.jit
def split_range(context, split, NUM_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Give begin and end of a split: whole tiles, the last one cut at the context's end."""
    split_tokens = tl.cdiv(tl.cdiv(context, BLOCK_N), NUM_SPLITS) * BLOCK_N
    begin = split * split_tokens
    return begin, tl.minimum(begin + split_tokens, context)


@triton.jit
def load_block_ids(block_table_row_ptr, token, end, BLOCK_SIZE: tl.constexpr):
    """Load the block id of each token, 0 beyond the end.

    Call it for the tile after the one that is being computed: a load that feeds another load inside the loop would
    take the pipeline's stages and leave K and V one buffer.
    """
    return tl.load(block_table_row_ptr + token // BLOCK_SIZE, mask=token < end, other=0)


@triton.jit
def softmax_step(score, top, total):
    """Fold a tile of scores (log2 scale) into the running maximum and sum.

    Returns the tile's weights, the factor by which the sums so far shrink, and the new maximum and sum. At least one
    score of the tile must be finite. Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    new_top = tl.maximum(top, tl.max(score, 1))
    decay = tl.exp2(top - new_top)
    weight = tl.exp2(score - new_top[:, None])
    return weight, decay, new_top, total * decay + tl.sum(weight, 1)
