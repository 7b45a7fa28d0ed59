"""Triton kernels for compressed KV caches, each beside a plain torch reference and its cases.

Each name in `KERNELS` is a folder (dots for slashes) with ``reference.py`` (torch, fp32), ``kernel.py`` (Triton),
``cases.py`` (shapes, inputs, `VARIANTS`) and ``README.md`` (layout in bytes, the maths). ``contract.py`` says what a
folder offers, ``formats`` how KV is stored in bytes, ``harness`` checks and compiles all of them, ``measure`` times
them on a GPU. Importing this package imports neither torch nor triton, and nothing here imports kvsim. Imports inside
are relative, because an installed copy has another name.
"""

KERNELS = (
    "decode_attention.native",
    "decode_attention.turboquant",
    "decode_attention.turboquant_paper",
    "decode_attention.fp8",
    "decode_attention.per_token_head",
    "decode_attention.ragged_heads",
    "decode_attention.page_sparse",
    "decode_attention.low_rank",
    "decode_attention.mla",
    "decode_attention.sparse_latent",
    "decode_attention.block_fp4",
    "decode_attention.kivi",
    "append.native",
    "append.fp8",
    "append.per_token_head",
    "append.latent",
    "append.turboquant",
    "append.turboquant_paper",
    "append.block_fp4",
    "append.kivi",
    "rotation.fast_hadamard",
    "rotation.dense",
    "baseline.prefill_attention",
    "baseline.rms_norm",
    "baseline.rope",
    "entropy.rans",
    "transform.kvtc",
    "select.top_k",
    "select.compaction",
    "select.merge",
    "select.weighted_atoms",
    "score.knorm",
    "score.keydiff",
    "score.tova",
    "score.h2o",
    "score.snapkv",
    "score.expected_attention",
    "score.quest",
    "score.infokv",
    "low_rank_projection",
)
"""Every kernel of this package, by the name of its subpackage."""
