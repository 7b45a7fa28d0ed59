"""The page on rotation states what the code computes."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from kvsim.numerics.lloyd_max import lloyd_max

PAGE = (Path(__file__).resolve().parents[2] / "docs/methods/rotation.md").read_text(encoding="utf-8")


def table(first_heading: str) -> list[list[str]]:
    lines = PAGE.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_distortions_are_as_computed() -> None:
    rows = table("Bits")
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    for row in rows:
        bits = int(row[0])
        books = [lloyd_max(bits, dimension) for dimension in (64, 128, 256, None)]
        assert row[1:5] == [f"{book.distortion:.5f}" for book in books]
        assert row[6:8] == [f"{math.sqrt(3) * math.pi / 2 * 4.0**-bits:.5f}", f"{4.0**-bits:.5f}"]
        assert row[8] == f"{books[1].entropy_bits:.3f}"


def test_variances_of_algorithm_2_are_as_computed() -> None:
    stated = re.search(r"([\d.]+)/d, ([\d.]+)/d, ([\d.]+)/d, ([\d.]+)/d for 1 to 4 bits", PAGE)
    assert stated is not None
    found = [math.pi / 2 * lloyd_max(bits - 1).distortion for bits in (1, 2, 3, 4)]
    assert [float(one) for one in stated.groups()] == pytest.approx(found, rel=2e-3)
