"""What a config says beside the language model's layers: a vision encoder's size, and how much of a head is rotated."""

from __future__ import annotations

from kvsim.hf_config.reader import MAX_LAYERS, ConfigReader

MLP_RATIO = 4
"""MLP width over hidden size of a ViT that states none (arXiv 2010.11929)."""


def vision_parameters(reader: ConfigReader) -> int:
    """Parameters of the vision encoder's layers: four square projections and an MLP of two; 0 without one.

    Patch embedding and projector, some per cent of it, are left out.
    """
    config = reader.mapping("vision_config")
    if config is None:
        return 0
    inner = ConfigReader(config, f"{reader.where}: vision_config")
    layers = inner.optional_integer("num_hidden_layers", "depth", "num_layers", "layers", maximum=MAX_LAYERS)
    hidden = inner.optional_integer("hidden_size", "embed_dim", "width")
    if not layers or not hidden:
        return 0
    width = inner.optional_integer("intermediate_size") or MLP_RATIO * hidden
    return layers * hidden * (4 * hidden + 2 * width)


def rotary_fraction(reader: ConfigReader) -> float:
    """Share of a head that is rotated: ``partial_rotary_factor``, here or among the rope parameters; 1 if absent."""
    inner = reader.mapping("rope_parameters") or {}
    value = reader.inherited("partial_rotary_factor")
    if value is None:
        value = inner.get("partial_rotary_factor")
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        reader.fail("partial_rotary_factor", f"must be a number from 0 to 1 (got {value!r:.60})")
    return float(value)
