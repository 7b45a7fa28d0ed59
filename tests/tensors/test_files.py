"""Caches go to safetensors and come back the same; what is odd is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvsim.errors import InvalidSpec
from kvsim.tensors import KvTensors, LayerKv, PromptSignals, Rope
from kvsim.tensors.ensemble import draw, preset
from kvsim.tensors.files import read_kv, write_kv

save_file = pytest.importorskip("safetensors.numpy").save_file
ml_dtypes = pytest.importorskip("ml_dtypes")


def _small() -> KvTensors:
    return draw(
        preset("llama-like", num_layers=2, num_tokens=64, num_queries=3, num_prompt_queries=8, num_needles=2), 0
    )


def _tensors(**changes: object) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(2):
        for name, shape in (("keys", (2, 5, 8)), ("values", (2, 5, 4)), ("queries", (4, 3, 8))):
            tensors[f"layers.{layer}.{name}"] = rng.standard_normal(shape).astype(np.float32)
    for name, value in changes.items():
        full = f"layers.1.{name}"
        if value is None:
            del tensors[full]
        else:
            tensors[full] = value  # type: ignore[assignment]
    return tensors


def test_an_ensemble_comes_back_bit_by_bit(tmp_path: Path) -> None:
    kv, path = _small(), tmp_path / "kv.safetensors"
    write_kv(kv, path)
    back = read_kv(path)
    for before, after in zip(kv.layers, back.layers, strict=True):
        for name in ("keys", "values", "queries", "prompt_queries", "positions"):
            assert np.array_equal(getattr(before, name), getattr(after, name)), name
            assert getattr(before, name).dtype == getattr(after, name).dtype
    assert kv.rope is not None
    assert back.rope is not None
    assert np.array_equal(kv.rope.inverse_frequencies, back.rope.inverse_frequencies)
    assert (back.attention_scale, back.source, back.native_bits, back.needles) == (
        kv.attention_scale, kv.source, 16, kv.needles,
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "bits"), [(np.float32, 32), (np.float16, 16), (ml_dtypes.bfloat16, 16)])
def test_every_float_dtype_is_kept_exactly(tmp_path: Path, dtype: type, bits: int) -> None:
    array = (np.random.default_rng(1).standard_normal((2, 6, 8)) * 3).astype(dtype).astype(np.float32)
    positions = np.broadcast_to(np.arange(6), (2, 6))
    kv = KvTensors((LayerKv(array, array, positions, array, array[:, :0]),), Rope.plain(8, 1e4), 0.25, "here", bits)
    path = tmp_path / "kv.safetensors"
    write_kv(kv, path)
    back = read_kv(path)
    assert np.array_equal(back.layers[0].keys, array)
    assert back.native_bits == bits
    assert path.stat().st_size < 2500 if bits == 16 else True


def test_what_may_be_missing_has_its_default(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    save_file(_tensors(), path)
    kv = read_kv(path)
    assert kv.rope is None
    assert kv.attention_scale == pytest.approx(8**-0.5)
    assert (kv.native_bits, kv.needles, kv.source) == (32, (), "plain.safetensors")
    assert np.array_equal(kv.layers[0].positions[1], np.arange(5))
    assert kv.layers[0].prompt_queries.shape == (4, 0, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": None}, "'layers.1.values' is missing"),
        ({"keys": np.zeros((2, 5), np.float32)}, "layers.1.keys has shape"),
        ({"keys": np.zeros((2, 5, 8), np.int64)}, "layers.1.keys is I64; allowed: BF16"),
        ({"values": np.zeros((2, 4, 4), np.float32)}, "layers.1: KV tensors of one layer disagree"),
        ({"queries": np.zeros((3, 3, 8), np.float32)}, "layers.1: queries"),
        ({"queries": np.full((4, 3, 8), np.nan, np.float32)}, "layers.1.queries has elements that are not finite"),
        ({"weights": np.zeros((2, 5), np.float32)}, "tensor 'layers.1.weights' is not one of"),
        ({"positions": np.zeros((2, 5), np.float32)}, "layers.1.positions is F32; allowed: I64"),
    ],
)
def test_odd_tensors_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = tmp_path / "odd.safetensors"
    save_file(_tensors(**changes), path)
    with pytest.raises(InvalidSpec, match=r"odd\.safetensors") as caught:
        read_kv(path)
    assert message in str(caught.value)


def _with_signals() -> KvTensors:
    kv, rng = _small(), np.random.default_rng(0)
    heads, tokens, dim = kv.layers[0].keys.shape
    read, asked, held = (
        tuple(rng.standard_normal(shape).astype(np.float32) for _ in kv.layers)
        for shape in ((tokens, 24), (kv.layers[0].queries.shape[0], tokens, dim), (heads, tokens, dim))
    )
    entropy, distance = (rng.random(shape).astype(np.float32) for shape in ((tokens,), (kv.num_layers, tokens)))
    return replace(kv, signals=PromptSignals(read, asked, held, entropy, distance))


@pytest.mark.parametrize("wanted", [(), ("hidden",), ("repeat_queries",), ("entropy", "distance")])
def test_signals_are_read_where_asked_for(tmp_path: Path, wanted: tuple[str, ...]) -> None:
    kv, path = _with_signals(), tmp_path / "kv.safetensors"
    write_kv(kv, path)
    back = read_kv(path, wanted).signals  # type: ignore[arg-type]
    asked = {*wanted, "repeat_keys"} if "repeat_queries" in wanted else {*wanted}
    for name in ("hidden", "repeat_queries", "repeat_keys", "entropy", "distance"):
        found, written = getattr(back, name), getattr(kv.signals, name)
        assert (found is not None) == (name in asked)
        assert found is None or all(np.array_equal(one, other) for one, other in zip(found, written, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": np.ones((4, 3), np.float32)}, "layers.1.hidden has shape [4, 3]; [5, any] is expected"),
        ({"hidden": np.ones((5, 3), np.float32)}, "tensor 'layers.0.hidden' is missing, though other layers have it"),
        ({"hidden": np.full((5, 3), np.nan, np.float32)}, "layers.1.hidden has elements that are not finite"),
        ({"repeat_queries": np.ones((4, 5), np.float32)}, "layers.1.repeat_queries has shape"),
    ],
)
def test_odd_signals_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = tmp_path / "odd.safetensors"
    save_file(_tensors(**changes), path)
    with pytest.raises(InvalidSpec, match=r"odd\.safetensors") as caught:
        read_kv(path, ("hidden", "repeat_queries"))
    assert message in str(caught.value)
    assert read_kv(path).signals.hidden is None


def test_a_second_reading_has_queries_and_keys() -> None:
    with pytest.raises(InvalidSpec, match="come together"):
        PromptSignals(repeat_queries=(np.ones((1, 1, 1), np.float32),))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"attention_scale": "x"}, "attention_scale 'x' is not a number"),
        ({"attention_scale": "-1"}, "above 0"),
        ({"native_bits": "8"}, "native_bits 16 or 32"),
        ({"needles": "[99]"}, "needles"),
        ({"needles": json.dumps({"a": 1})}, "needles"),
    ],
)
def test_odd_metadata_is_named(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    path = tmp_path / "odd.safetensors"
    save_file(_tensors(), path, metadata=metadata)
    with pytest.raises(InvalidSpec, match=message):
        read_kv(path)


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSpec, match="no such file"):
        read_kv(tmp_path / "none.safetensors")
    pickled = tmp_path / "kv.pt"
    pickled.write_bytes(b"\x80\x04")
    with pytest.raises(InvalidSpec, match="pickled"):
        read_kv(pickled)
    for content in (b"", b"PK\x03\x04" * 30):
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(content)
        with pytest.raises(InvalidSpec, match="not a readable safetensors file"):
            read_kv(broken)
    gap = tmp_path / "gap.safetensors"
    save_file({name.replace("layers.1", "layers.3"): one for name, one in _tensors().items()}, gap)
    with pytest.raises(InvalidSpec, match=r"without gaps, but it has \[0, 3\]"):
        read_kv(gap)
    monkeypatch.setattr("kvsim.tensors.files.MAX_FILE_BYTES", 10)
    with pytest.raises(InvalidSpec, match="is more than"):
        read_kv(gap)
    with pytest.raises(InvalidSpec, match=r"must end in \.safetensors"):
        write_kv(_small(), tmp_path / "kv.npz")
