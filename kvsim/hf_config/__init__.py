"""Turns a Hugging Face ``config.json`` into a :class:`kvsim.specs.model.ModelSpec`."""

from kvsim.hf_config.parse import parse_hf_config

__all__ = ["parse_hf_config"]
