"""Seeded KV caches with stated statistics, for machines without any model.

``draw(spec, seed, sequence=k) -> KvTensors``. ``seed`` fixes the "model": bases, channel scales, which heads retrieve.
``sequence`` draws another text for the same model, so that a codec calibrated on sequences 1, 2, ... is judged on
sequence 0. ``preset("llama-like", num_tokens=2048)`` gives a named spec; ``parse_ensemble("llama-like:7")`` reads the
command line's spelling. Elements are exact in bf16. What is promised is in `EnsembleSpec`, field by field; tests
measure it. An ensemble is not a model: it orders methods by mechanisms that are put in, and says nothing about one that
is not (text, layers that resemble each other in direction, errors that grow through depth).
"""

from __future__ import annotations

from kvsim.tensors.ensemble.draw import draw
from kvsim.tensors.ensemble.spec import PRESETS, EnsembleSpec, parse_ensemble, preset

__all__ = ["PRESETS", "EnsembleSpec", "draw", "parse_ensemble", "preset"]
