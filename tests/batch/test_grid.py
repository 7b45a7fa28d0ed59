from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.batch import SweepSpec, check_sweep, load_sweep
from kvsim.errors import InvalidSpec

BASE = {"model": "llama-3.1-8b", "device": "h100-sxm", "workload": "chat"}


def points(**axes):
    return list(check_sweep(SweepSpec(base=BASE, **axes), Path()).points())


def test_grid_varies_its_last_key_fastest_and_link_faster_still():
    got = points(grid={"seed": (1, 2), "replicas": (3, 4)}, link={"model": ("a", "b"), "device": ("x", "y")})
    assert got[:3] == [
        {"seed": 1, "replicas": 3, "model": "a", "device": "x"},
        {"seed": 1, "replicas": 3, "model": "b", "device": "y"},
        {"seed": 1, "replicas": 4, "model": "a", "device": "x"},
    ]
    assert len(got) == 8


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), linked=st.integers(0, 4))
def test_number_of_points_is_the_product(lengths, linked):
    keys = ("seed", "replicas", "tensor_parallel_size", "engine.max_num_seqs")
    grid = {key: tuple(range(length)) for key, length in zip(keys, lengths, strict=False)}
    link = {"model": tuple("abcd"[:linked])} if linked else {}
    sweep = check_sweep(SweepSpec(base=BASE, grid=grid, link=link), Path())
    got = [tuple(point.items()) for point in sweep.points()]
    assert len(got) == len(set(got)) == sweep.num_points


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({}, "nothing varies"),
        ({"grid": {"engine.max_num_seq": (1,)}}, "did you mean 'max_num_seqs'?"),
        ({"link": {"seed": (1, 2), "replicas": (1,)}}, "seed has 2, replicas has 1"),
        ({"grid": {"seed": (1,)}, "link": {"seed": (1,)}}, "both 'grid' and 'link'"),
        ({"grid": {"seed": tuple(range(200)), "replicas": tuple(range(200))}}, "40000 points exceed max_points 20000"),
    ],
)
def test_wrong_sweeps_are_refused_before_any_point_runs(axes, expected):
    with pytest.raises(InvalidSpec) as caught:
        points(**axes)
    assert expected in str(caught.value)


def test_base_may_be_a_file_beside_the_sweep(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "base.yaml").write_text("model: m\ndevice: d\nworkload: chat\n")
    path = tmp_path / "sweep.yaml"
    path.write_text("base: sub/base.yaml\ngrid: {seed: [1, 2]}\n")
    sweep = load_sweep(path)
    assert sweep.document["model"] == "m"
    assert sweep.base_dir == tmp_path / "sub"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: {model: m}\ngrd: {seed: [1]}\n", "grd: unknown key; did you mean 'grid'?"),
        ("base: {model: m}\ngrid: {seed: []}\n", "grid.seed"),
        ("base: nope.yaml\ngrid: {seed: [1]}\n", "nope.yaml: cannot read"),
        ("grid: {seed: [1]}\n", "base: required, but missing"),
    ],
)
def test_wrong_sweep_files(tmp_path, text, expected):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(InvalidSpec) as caught:
        load_sweep(path)
    assert expected in str(caught.value)
