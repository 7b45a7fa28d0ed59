"""Put another attention function into a Hugging Face model for a while (extra ``capture``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

_NAME: Final = "kvsim"


@contextmanager
def attention_of(model: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Let the model attend by ``function`` within the block; it gets no mask and has to be causal by itself."""
    from transformers import AttentionInterface

    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, function)
    try:
        model.set_attn_implementation(_NAME)
        yield
    finally:
        model.set_attn_implementation(before)
