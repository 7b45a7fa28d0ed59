"""The figures of docs/methods/low-rank.md that cost little to check."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from kvsim.compression import parse_compression, stored_bytes
from kvsim.model_catalog import load_model
from kvsim.numerics.svd import rank_for_energy, second_moment
from kvsim.tensors import Rope

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "methods" / "low-rank.md").read_text(encoding="utf-8")
MODEL = load_model("llama-3.1-8b")


def _directions(dim: int, rank: int) -> tuple[float, float]:
    rng, rope = np.random.default_rng(0), Rope.plain(dim, 10_000.0)
    found = []
    for _ in range(4):
        bare = (rng.standard_normal((2048, rank)) @ rng.standard_normal((rank, dim))).astype(np.float32)
        turned = rope.rotate(bare, np.arange(2048))
        found.append([rank_for_energy(second_moment(rows), 0.99) for rows in (bare, turned)])
    before, after = np.mean(found, axis=0)
    return float(before), float(after)


@pytest.mark.parametrize("dim", [64, 128])
def test_directions_before_and_after_rope(dim: int) -> None:
    (row,) = re.findall(rf"^\| D = {dim}, before / after \|(.+)\|$", PAGE, re.MULTILINE)
    for rank, cell in zip((4, 8, 16, 32), row.split("|"), strict=True):
        stated = [float(number) for number in cell.split("/")]
        assert stated == pytest.approx(_directions(dim, rank), abs=0.6)


@pytest.mark.parametrize("name", ["low_rank", "kq_svd", "eigen_attention", "xkv", "mla"])
def test_bytes_per_token(name: str) -> None:
    (row,) = re.findall(rf"^\| `{name}`.*\|$", PAGE.split("## Which")[0], re.MULTILINE)
    cells = [cell.strip() for cell in row.split("|")]
    compression = parse_compression(name)
    taken = stored_bytes(compression, MODEL, 2001, 0) - stored_bytes(compression, MODEL, 2000, 0)
    assert int(cells[5].replace(",", "")) == taken
    assert int(cells[4].replace(",", "")) == taken / 64


def test_bases_of_xkv() -> None:
    encoding = parse_compression("xkv").stored
    assert 32 * encoding.fixed_bytes_per_sequence(MODEL.groups[0], MODEL.dtype) == 80 * 2**20
