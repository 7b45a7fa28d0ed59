"""Decode batches to check and to time attention with, their inputs, and what every KV format's variant shares."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from ..contract import CountedLoop, Traffic, Variant
from ..devices import num_multiprocessors
from ..formats.base import KvFormat
from ..launches import Launch, LaunchConfig
from .combine import plan_combine
from .reference import decode_attention_reference

MIN_DOT_ROWS = 16
MAX_SPLITS = 64
DISTINCT_BLOCKS = 4096
_GIB = 1 << 30


@dataclass(frozen=True)
class DecodeBatch:
    """One decode batch.

    Attributes
    ----------
    dtype : str
        The model's: queries, outputs, and K and V before they are encoded.
    context_lens : tuple of int
        Cached tokens of each request.
    num_splits : int or None
        Parts that each context is divided into, a power of two; None: as many as fill the GPU.
    role : {'fit', 'small', 'held_out', 'long'}
        What a timing is for.
    """

    name: str
    dtype: str
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    context_lens: tuple[int, ...]
    num_splits: int | None = None
    role: str = "fit"

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def native_kv_bytes(self) -> int:
        """Bytes of K and V uncompressed."""
        element_bytes = 4 if self.dtype == "float32" else 2
        return 2 * sum(self.context_lens) * self.num_kv_heads * self.head_dim * element_bytes


RAGGED = (1, 15, 16, 17, 130, 0, 63)

CORRECTNESS_BATCHES = (
    DecodeBatch("one-token", "float16", 4, 2, 64, 16, (1,), 1),
    DecodeBatch("ragged-gqa", "float16", 8, 2, 64, 16, RAGGED, 4),
    DecodeBatch("ragged-gqa-bf16", "bfloat16", 8, 2, 64, 16, RAGGED, 4),
    DecodeBatch("multi-head", "float16", 3, 3, 32, 16, (65, 64), 2),
    DecodeBatch("multi-query-17-heads", "bfloat16", 17, 1, 128, 32, (77,), 2),
    DecodeBatch("more-splits-than-tiles", "float16", 4, 1, 128, 16, (40, 200), 16),
    DecodeBatch("all-empty", "float16", 4, 1, 64, 16, (0, 0), 2),
    DecodeBatch("head-dim-256", "bfloat16", 8, 1, 256, 16, (70,), 2),
)
"""Small enough for Triton's interpreter, and odd on purpose; every format runs those it can."""

COMPILE_BATCH = DecodeBatch("llama-3-8b", "bfloat16", 32, 8, 128, 16, (64, 128), 8)
"""The heads of Llama-3.1-8B, in a small pool."""


def _timing_batches() -> tuple[DecodeBatch, ...]:
    """Spread shapes evenly over log batch and log context, then add floors, long contexts and held-out shapes.

    The spread is the R2 low-discrepancy sequence (Roberts 2018); uncompressed KV lies between 0.25 and 8 GiB.
    """
    shapes: list[DecodeBatch] = []
    heads = ((32, 8), (64, 8), (28, 4), (32, 8), (16, 2))
    root = 1.32471795724474602596
    index = 0
    while len(shapes) < 40:
        index += 1
        batch = round(2 ** (8 * ((0.5 + index / root) % 1)))
        context = round(2 ** (9 + 8 * ((0.5 + index / root**2) % 1)))
        query_heads, kv_heads = heads[len(shapes) % len(heads)]
        shape = DecodeBatch(
            f"{batch}x{context}-{query_heads}/{kv_heads}", "bfloat16", query_heads, kv_heads, 128, 16,
            (context,) * batch, role="fit" if len(shapes) % 5 != 4 else "held_out",
        )  # fmt: skip
        if 0.25 * _GIB <= shape.native_kv_bytes <= 8 * _GIB:
            shapes.append(shape)
    llama = replace(COMPILE_BATCH, num_splits=None)
    small = [
        replace(llama, name=f"{batch}x{context}-32/8", context_lens=(context,) * batch, role="small")
        for batch, context in ((1, 16), (1, 256), (4, 512), (16, 128), (8, 1024), (32, 256))
    ]
    long = [
        replace(llama, name=f"1x{context}-32/8", context_lens=(context,), role="long")
        for context in (4096, 16384, 65536, 131072)
    ]
    ragged = replace(
        llama, name="ragged-64", context_lens=tuple(512 + 128 * index for index in range(64)), role="held_out"
    )
    return (*small, *long, *shapes, ragged)


TIMING_BATCHES = _timing_batches()
"""32 shapes to fit, 6 small ones for the floor, 4 long single requests, 9 held out."""


def make_block_table(case: DecodeBatch, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Deal blocks out at random: block table, lengths, and the id of a block that belongs to nobody.

    Table entries beyond a request's blocks name that last block, which is poisoned, so that a stray read shows.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks_of = [-(-tokens // case.block_size) for tokens in case.context_lens]
    poisoned, *free = torch.randperm(sum(blocks_of) + 1, generator=generator).tolist()
    table = torch.full((len(blocks_of), max(1, *blocks_of)), poisoned, dtype=torch.int32)
    for b, count in enumerate(blocks_of):
        table[b, :count] = torch.tensor(free[:count], dtype=torch.int32)
        del free[:count]
    return table.to(device), torch.tensor(case.context_lens, dtype=torch.int32).to(device), poisoned


def poison(view: torch.Tensor, where: torch.Tensor) -> None:
    """Set a field to NaN where a mask over its leading dimensions holds; integer codes stay as they are."""
    if view.is_floating_point():
        view[where] = float("nan")


def fill_pages(
    kv_format: KvFormat, case: DecodeBatch, block_table: torch.Tensor, unowned: int, *, seed: int
) -> torch.Tensor:
    """Draw K and V from N(0, 1), encode them, and poison rows that hold no token; give the pool."""
    device = block_table.device
    generator = torch.Generator(device=device).manual_seed(seed + 1)
    dtype = getattr(torch, case.dtype)
    layout = kv_format.layout(
        num_kv_heads=case.num_kv_heads, head_dim=case.head_dim, block_size=case.block_size, dtype=dtype
    )
    num_blocks = sum(-(-tokens // case.block_size) for tokens in case.context_lens) + 1
    pages = layout.allocate(num_blocks, device)
    shape = (case.block_size, case.num_kv_heads, case.head_dim)
    # A large pool repeats its first blocks: to a GPU they are random all the same, and encoding costs more than timing.
    distinct = min(num_blocks, DISTINCT_BLOCKS)
    keys, values = (torch.randn(distinct, *shape, generator=generator, device=device).to(dtype) for _ in range(2))
    layout.store(pages[:distinct], kv_format.encode(keys, values))
    for first in range(distinct, num_blocks, distinct):
        part = pages[first : first + distinct]
        part.copy_(pages[: len(part)])
    poison_pages(layout.views(pages), case, block_table, unowned)
    return pages


def poison_pages(views: Mapping[str, torch.Tensor], case: DecodeBatch, block_table: torch.Tensor, unowned: int) -> None:
    """Put NaN where no token lies: rows after each request's last token, and the whole unowned block."""
    for view in views.values():
        poison(view, torch.tensor([unowned], device=view.device))
        if view.shape[1] != case.block_size:
            continue
        for b, tokens in enumerate(case.context_lens):
            if used := tokens % case.block_size:
                poison(view[int(block_table[b, tokens // case.block_size])], slice(used, None))  # type: ignore[arg-type]


def choose_num_splits(batch: int, num_kv_heads: int, max_context: int, num_multiprocessors: int, block_n: int) -> int:
    """Split the context so that two programs per multiprocessor exist, at least a tile each; a power of two."""
    wanted = math.ceil(2 * num_multiprocessors / (batch * num_kv_heads))
    tiles = max(1, math.ceil(max_context / block_n))
    return min(MAX_SPLITS, triton.next_power_of_2(min(wanted, tiles)))


class DecodeAttention(Variant):
    """What the decode attention of every KV format shares; a format adds its split kernel and its tilings.

    Inputs: ``query`` (batch, num_query_heads, head_dim), ``pages`` (num_blocks, page_bytes) uint8, the format's fields
    as views of it by name under ``fields``, ``block_table``, ``context_lens``, ``scale``.
    """

    operation = "decode_attention"
    cost_unit = "token_kv_head"
    uses_matrix_units = True
    correctness_cases: tuple[Any, ...] = CORRECTNESS_BATCHES
    timing_cases: tuple[Any, ...] = TIMING_BATCHES
    compile_case: Any = COMPILE_BATCH
    split_kernel_name: str
    kv_format: KvFormat

    def make_inputs(self, case: DecodeBatch, *, seed: int, device: str) -> dict[str, Any]:
        block_table, context_lens, unowned = make_block_table(case, seed, device)
        pages = fill_pages(self.kv_format, case, block_table, unowned, seed=seed)
        generator = torch.Generator(device=device).manual_seed(seed + 2)
        query = torch.randn(
            len(case.context_lens), case.num_query_heads, case.head_dim, generator=generator, device=device
        )
        layout = self.kv_format.layout(
            num_kv_heads=case.num_kv_heads,
            head_dim=case.head_dim,
            block_size=case.block_size,
            dtype=getattr(torch, case.dtype),
        )
        return {
            "query": query.to(getattr(torch, case.dtype)),
            "pages": pages,
            "fields": layout.views(pages),
            "block_table": block_table,
            "context_lens": context_lens,
            "scale": case.head_dim**-0.5,
        }

    def reference(self, case: DecodeBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        keys, values = self.kv_format.decode(inputs["fields"], case.head_dim)
        shared = (inputs["block_table"], inputs["context_lens"], inputs["scale"])
        return {"output": decode_attention_reference(inputs["query"], keys, values, *shared)}

    def allocate(self, case: DecodeBatch, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        query = inputs["query"]
        batch, num_query_heads = query.shape[:2]
        num_splits = case.num_splits or choose_num_splits(
            batch, case.num_kv_heads, max(case.context_lens), num_multiprocessors(query), config.block_n
        )
        value_dim = self.value_dim(case)
        return {
            "output": query.new_empty(batch, num_query_heads, value_dim),
            "partial": query.new_empty((batch, num_query_heads, num_splits, value_dim), dtype=torch.float32),
            "lse": query.new_empty((batch, num_query_heads, num_splits), dtype=torch.float32),
        }

    def plan(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        split = self.plan_split(case, inputs, buffers, config)
        return split, plan_combine(buffers["partial"], buffers["lse"], buffers["output"])

    def plan_split(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> Launch:
        """Lay out the kernel that fills ``partial`` and ``lse``."""
        raise NotImplementedError

    def value_dim(self, case: DecodeBatch) -> int:
        """Elements of one head's output."""
        return case.head_dim

    def counted_loop(self, case: DecodeBatch, config: LaunchConfig) -> CountedLoop:
        return CountedLoop(self.split_kernel_name, "matrix_loop", units=config.block_n)

    def traffic(self, case: DecodeBatch) -> Traffic:
        dtype = getattr(torch, case.dtype)
        layout = self.kv_format.layout(
            num_kv_heads=case.num_kv_heads, head_dim=case.head_dim, block_size=case.block_size, dtype=dtype
        )
        tokens = sum(case.context_lens)
        residual = sum(min(tokens, self.kv_format.residual_tokens) for tokens in case.context_lens)
        native_token_bytes = 2 * case.num_kv_heads * case.head_dim * dtype.itemsize
        rows = len(case.context_lens) * case.num_query_heads
        return Traffic(
            read_bytes=(tokens - residual) * layout.page_bytes // case.block_size
            + residual * native_token_bytes
            + rows * case.head_dim * dtype.itemsize,
            written_bytes=rows * self.value_dim(case) * dtype.itemsize,
            flops=2 * case.num_query_heads * tokens * (case.head_dim + self.value_dim(case)),
            units=tokens * case.num_kv_heads,
        )


def check_decode_inputs(case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError, naming the first rule broken, unless the tensors fit the case and each other."""
    query, block_table, context_lens = inputs["query"], inputs["block_table"], inputs["context_lens"]
    batch, num_query_heads = query.shape[:2]
    partial, lse = buffers["partial"], buffers["lse"]
    num_splits = lse.shape[-1]
    requirements = {
        "query must be (batch, num_query_heads, head_dim) of the case": query.shape
        == (len(case.context_lens), case.num_query_heads, case.head_dim),
        "the number of query heads must be a multiple of that of KV heads": num_query_heads % case.num_kv_heads == 0,
        "block_table and context_lens must be int32": block_table.dtype == context_lens.dtype == torch.int32,
        "block_table and context_lens must have a row per request": len(block_table) == len(context_lens) == batch,
        "num_splits must be a power of two": num_splits > 0 and num_splits & (num_splits - 1) == 0,
        "partial must be contiguous, (batch, num_query_heads, num_splits, value_dim)": partial.is_contiguous()
        and partial.shape[:3] == (batch, num_query_heads, num_splits),
        "lse must be contiguous, (batch, num_query_heads, num_splits)": lse.is_contiguous()
        and lse.shape == (batch, num_query_heads, num_splits),
        "the last dimension must be contiguous": all(
            tensor.stride(-1) == 1 for tensor in (query, block_table, context_lens)
        ),
    }
    for requirement, met in requirements.items():
        if not met:
            raise ValueError(requirement)
