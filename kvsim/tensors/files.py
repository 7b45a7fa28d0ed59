"""KV caches as safetensors files, in and out. Nothing in such a file is executed.

Tensors, per layer i from 0 on:

- ``layers.i.keys`` (H, n, D), ``layers.i.values`` (H, n, Dv): BF16, F16 or F32, after RoPE, as an engine caches them
- ``layers.i.queries`` (Hq, m, D): queries that come after the cached tokens
- ``layers.i.prompt_queries`` (Hq, w, D): the last w queries of the prompt; may be missing
- ``layers.i.positions`` (H, n), I64 or I32: positions of the tokens; 0 to n - 1 where missing
- ``rope.inverse_frequencies`` (rotary_dim / 2,), F32: radians per position, half-split layout; unknown where missing

Signals (see :class:`kvsim.tensors.PromptSignals`), which a file may have or not, and which are read only where a method
asks for them:

- ``layers.i.hidden`` (n, width): what the layer's attention reads
- ``layers.i.repeat_queries`` (Hq, n, D) and ``layers.i.repeat_keys`` (H, n, D): a second reading of the prompt
- ``signals.entropy`` (n,) and ``signals.distance`` (L, n)

Metadata, all text: ``attention_scale`` (1 / sqrt(D) where missing), ``native_bits`` (16 or 32; that of the keys where
missing), ``source``, ``needles`` (a JSON list of positions).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvsim.documents import check_output_path, write_output
from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import FloatArray, IntArray
from kvsim.tensors.kv import KvTensors, LayerKv, Rope, SignalName
from kvsim.tensors.signal_files import LAYER_SIGNALS, PROMPT_SIGNALS, named_tensors, signal_of, signals_of
from kvsim.units import format_bytes

SUFFIX: Final = ".safetensors"
MAX_FILE_BYTES: Final = 8 * 2**30
"""Elements are held as fp32, so a file of bf16 takes twice its size in memory, and a strategy as much again."""
_FLOATS: Final = {"BF16": 16, "F16": 16, "F32": 32}
_INTEGERS: Final = ("I64", "I32")
_ROPE: Final = "rope.inverse_frequencies"
_DIMENSIONS: Final = {"keys": 3, "values": 3, "queries": 3, "prompt_queries": 3, "positions": 2}
_NAME: Final = re.compile(rf"layers\.(\d+)\.({'|'.join((*_DIMENSIONS, *LAYER_SIGNALS))})")


def write_kv(kv: KvTensors, path: Path) -> None:
    """Write a cache; each tensor in the narrowest of BF16, F16 and F32 that holds it exactly.

    Raises
    ------
    InvalidSpec
        The name does not end in .safetensors, the system refuses to write, or entries have log-weights.
    """
    from safetensors.numpy import save

    check_output_path(path, (SUFFIX,))
    if any(layer.log_weights is not None for layer in kv.layers):
        msg = f"{path}: a cache whose entries have log-weights is already compressed, and such files hold whole caches"
        raise InvalidSpec(msg)
    tensors: dict[str, Any] = {}
    for index, layer in enumerate(kv.layers):
        for name in ("keys", "values", "queries", "prompt_queries"):
            tensors[f"layers.{index}.{name}"] = _narrowed(getattr(layer, name))
        tensors[f"layers.{index}.positions"] = np.ascontiguousarray(layer.positions, dtype=np.int64)
    tensors |= {name: _narrowed(array) for name, array in named_tensors(kv.signals).items()}
    if kv.rope is not None:
        tensors[_ROPE] = np.ascontiguousarray(kv.rope.inverse_frequencies, dtype=np.float32)
    metadata = {
        "attention_scale": repr(float(kv.attention_scale)),
        "native_bits": str(kv.native_bits),
        "source": kv.source,
        "needles": json.dumps(list(kv.needles)),
    }
    write_output(path, save(tensors, metadata))


def _narrowed(array: FloatArray) -> Any:
    import ml_dtypes

    for dtype in (ml_dtypes.bfloat16, np.float16):
        with np.errstate(over="ignore"):
            narrow = np.ascontiguousarray(array).astype(dtype)
        if np.array_equal(narrow.astype(np.float32), array):
            return narrow
    return np.ascontiguousarray(array, dtype=np.float32)


def read_kv(path: Path, signals: Collection[SignalName] = ()) -> KvTensors:
    """Read a cache, with those ``signals`` of the prompt that the file has; others it has are left alone.

    Raises
    ------
    InvalidSpec
        No such file, too large, not safetensors, or a tensor or a piece of metadata is missing, odd or not finite; the
        message names it.
    """
    import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
    from safetensors import SafetensorError, safe_open

    _check_file(path)
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            _check_names(path, names)
            tensors = {name: _load(path, file, name) for name in names if signal_of(name) in (None, *signals)}
            dtypes = {name: str(file.get_slice(name).get_dtype()) for name in tensors}
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        msg = f"{path}: not a readable safetensors file: {error}"
        raise InvalidSpec(msg) from error
    return _assemble(path, tensors, dtypes, metadata)


def _check_file(path: Path) -> None:
    if not path.is_file():
        msg = f"{path}: no such file"
        raise InvalidSpec(msg)
    if path.suffix != SUFFIX:
        msg = (
            f"{path}: KV tensors are read from {SUFFIX} files only (pickled .pt and .bin files can run code); "
            "write one with `kvsim quality capture`"
        )
        raise InvalidSpec(msg)
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        msg = (
            f"{path}: {format_bytes(size)} is more than {format_bytes(MAX_FILE_BYTES)}; capture fewer tokens or layers"
        )
        raise InvalidSpec(msg)


def _check_names(path: Path, names: list[str]) -> None:
    known = [match for match in map(_NAME.fullmatch, names) if match]
    odd = sorted(set(names) - {match[0] for match in known} - {_ROPE, *PROMPT_SIGNALS})
    if odd:
        parts = ", ".join((*_DIMENSIONS, *LAYER_SIGNALS))
        msg = f"{path}: tensor {odd[0]!r} is not one of layers.I.{{{parts}}}, {_ROPE} or {' or '.join(PROMPT_SIGNALS)}"
        raise InvalidSpec(msg)
    indices = {int(match[1]) for match in known}
    if indices != set(range(len(indices))) or not indices:
        msg = f"{path}: layers must be numbered from 0 on without gaps, but it has {sorted(indices) or 'none'}"
        raise InvalidSpec(msg)
    for index in range(len(indices)):
        for name in ("keys", "values", "queries"):
            if f"layers.{index}.{name}" not in names:
                msg = f"{path}: tensor 'layers.{index}.{name}' is missing"
                raise InvalidSpec(msg)


def _load(path: Path, file: Any, name: str) -> Any:
    """Read one tensor: floats as fp32, integers as int64."""
    view = file.get_slice(name)
    dtype, shape = str(view.get_dtype()), tuple(view.get_shape())
    match = _NAME.fullmatch(name)
    kind = match[2] if match else ""
    allowed = _INTEGERS if kind == "positions" else tuple(_FLOATS)
    if dtype not in allowed:
        msg = f"{path}: {name} is {dtype}; allowed: {', '.join(allowed)}"
        raise InvalidSpec(msg)
    # Signals are held against the cache, once all of it is known.
    dimensions = len(shape) if signal_of(name) else _DIMENSIONS.get(kind, 1)
    if len(shape) != dimensions or (kind in ("keys", "values", "positions") and 0 in shape):
        msg = f"{path}: {name} has shape {list(shape)}; {dimensions} dimensions, none of them 0, are expected"
        raise InvalidSpec(msg)
    array = file.get_tensor(name).astype(np.int64 if kind == "positions" else np.float32)
    if not np.isfinite(array).all():
        msg = f"{path}: {name} has elements that are not finite"
        raise InvalidSpec(msg)
    return array


def _assemble(
    path: Path, tensors: Mapping[str, Any], dtypes: Mapping[str, str], metadata: Mapping[str, str]
) -> KvTensors:
    count = sum(name.endswith(".keys") for name in tensors)
    try:
        layers = tuple(_layer(tensors, index) for index in range(count))
    except InvalidSpec as error:
        error.locate(str(path))
        raise
    key_dim = layers[0].keys.shape[2]
    rope = _rope(path, tensors.get(_ROPE), key_dim)
    scale = _number(path, metadata, "attention_scale", key_dim**-0.5)
    bits = _number(path, metadata, "native_bits", float(_FLOATS[dtypes["layers.0.keys"]]))
    if scale <= 0.0 or bits not in (16.0, 32.0):
        msg = f"{path}: attention_scale must be above 0 and native_bits 16 or 32, not {scale:g} and {bits:g}"
        raise InvalidSpec(msg)
    needles = _needles(path, metadata, layers[0].positions)
    try:
        signals = signals_of(tensors, layers)
    except InvalidSpec as error:
        error.locate(str(path))
        raise
    return KvTensors(layers, rope, scale, metadata.get("source") or path.name, int(bits), needles, signals)


def _layer(tensors: Mapping[str, Any], index: int) -> LayerKv:
    keys, values, queries = (tensors[f"layers.{index}.{name}"] for name in ("keys", "values", "queries"))
    heads, tokens, dim = keys.shape
    no_queries = np.zeros((queries.shape[0], 0, dim), dtype=np.float32)
    positions: IntArray = np.broadcast_to(np.arange(tokens), (heads, tokens)).copy()
    try:
        return LayerKv(
            keys,
            values,
            tensors.get(f"layers.{index}.positions", positions),
            queries,
            tensors.get(f"layers.{index}.prompt_queries", no_queries),
        )
    except InvalidSpec as error:
        error.locate(f"layers.{index}")
        raise


def _rope(path: Path, frequencies: Any, key_dim: int) -> Rope | None:
    if frequencies is None:
        return None
    if 2 * len(frequencies) > key_dim:
        msg = f"{path}: {_ROPE} turns {2 * len(frequencies)} channels, but keys have {key_dim}"
        raise InvalidSpec(msg)
    return Rope(frequencies)


def _number(path: Path, metadata: Mapping[str, str], name: str, default: float) -> float:
    text = metadata.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        msg = f"{path}: metadata {name} {text!r} is not a number"
        raise InvalidSpec(msg)
    return value


def _needles(path: Path, metadata: Mapping[str, str], positions: IntArray) -> tuple[int, ...]:
    text = metadata.get("needles", "[]")
    try:
        needles = json.loads(text)
    except ValueError:
        needles = None
    held = set(positions.ravel().tolist())
    if not isinstance(needles, list) or not all(type(one) is int and one in held for one in needles):
        msg = f"{path}: metadata needles {text!r} is not a JSON list of positions of cached tokens"
        raise InvalidSpec(msg)
    return tuple(needles)
