"""KV tensors as data: what a cache holds, and what attention reads from it. Plain numpy, fp32."""

from __future__ import annotations

from kvsim.numerics.arrays import BoolArray, FloatArray, IntArray
from kvsim.tensors.attention import Attended, attend
from kvsim.tensors.kv import SIGNALS, TENSORS, KvTensors, LayerKv, PromptSignals, Rope, SignalName, TensorName

__all__ = [
    "SIGNALS",
    "TENSORS",
    "Attended",
    "BoolArray",
    "FloatArray",
    "IntArray",
    "KvTensors",
    "LayerKv",
    "PromptSignals",
    "Rope",
    "SignalName",
    "TensorName",
    "attend",
]
