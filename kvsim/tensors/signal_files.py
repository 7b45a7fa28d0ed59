"""Signals of a prompt as named tensors of a file, in and out; see :mod:`kvsim.tensors.files`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import FloatArray
from kvsim.tensors.kv import LayerKv, PromptSignals, SignalName

LAYER_SIGNALS: Final[Mapping[str, SignalName]] = {
    "hidden": "hidden",
    "repeat_queries": "repeat_queries",
    "repeat_keys": "repeat_queries",
}
"""Tensor of a layer -> the signal that it belongs to."""
PROMPT_SIGNALS: Final[Mapping[str, SignalName]] = {"signals.entropy": "entropy", "signals.distance": "distance"}


def signal_of(name: str) -> SignalName | None:
    """Which signal a tensor belongs to, if any."""
    return LAYER_SIGNALS.get(name.rpartition(".")[2]) or PROMPT_SIGNALS.get(name)


def named_tensors(signals: PromptSignals) -> dict[str, FloatArray]:
    """Whatever is known, by its name in a file."""
    found = {}
    for name in LAYER_SIGNALS:
        for index, array in enumerate(getattr(signals, name) or ()):
            found[f"layers.{index}.{name}"] = array
    for name, signal in PROMPT_SIGNALS.items():
        if getattr(signals, signal) is not None:
            found[name] = getattr(signals, signal)
    return found


def signals_of(tensors: Mapping[str, Any], layers: Sequence[LayerKv]) -> PromptSignals:
    """Put together the signals of a cache.

    Raises
    ------
    InvalidSpec
        Some layers have a signal and others not, or one does not fit the cache.
    """
    for name, shape in _shapes(layers).items():
        array = tensors.get(name)
        if array is not None and not _fits(array.shape, shape):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            msg = f"{name} has shape {list(array.shape)}; [{wanted}] is expected"
            raise InvalidSpec(msg)
    found: dict[str, Any] = {name: _all_layers(tensors, name, len(layers)) for name in LAYER_SIGNALS}
    found |= {signal: tensors.get(name) for name, signal in PROMPT_SIGNALS.items()}
    return PromptSignals(**found)


def _shapes(layers: Sequence[LayerKv]) -> dict[str, tuple[int | None, ...]]:
    """Shape of every signal; None where any size but 0 will do."""
    tokens = layers[0].num_tokens
    shapes: dict[str, tuple[int | None, ...]] = {
        "signals.entropy": (tokens,),
        "signals.distance": (len(layers), tokens),
    }
    for index, layer in enumerate(layers):
        heads, _, dim = layer.keys.shape
        shapes[f"layers.{index}.hidden"] = (tokens, None)
        shapes[f"layers.{index}.repeat_queries"] = (layer.queries.shape[0], tokens, dim)
        shapes[f"layers.{index}.repeat_keys"] = (heads, tokens, dim)
    return shapes


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    pairs = zip(shape, expected, strict=False)
    return len(shape) == len(expected) and all(size > 0 and wanted in (None, size) for size, wanted in pairs)


def _all_layers(tensors: Mapping[str, Any], name: str, count: int) -> tuple[FloatArray, ...] | None:
    names = [f"layers.{index}.{name}" for index in range(count)]
    missing = [one for one in names if one not in tensors]
    if len(missing) == count:
        return None
    if missing:
        msg = f"tensor {missing[0]!r} is missing, though other layers have it"
        raise InvalidSpec(msg)
    return tuple(tensors[one] for one in names)
