"""Options that say which KV tensors to measure: a file, an ensemble, or what a model keeps of a text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kvsim.quality.capture import Captured
    from kvsim.tensors import KvTensors, SignalName

TOKENS, QUERIES, PROMPT_QUERIES = 1024, 32, 64

KvOption = Annotated[Path | None, typer.Option("--kv", metavar="FILE", help="KV tensors: .safetensors.")]
EnsembleOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:SEED]",
        help="Draw them: llama-like, heavy-keys, retrieval or diffuse, with (field=value,...) after it.",
    ),
]
TokensOption = Annotated[
    int | None, typer.Option("--tokens", min=1, show_default=str(TOKENS), help="Tokens of the text that are cached.")
]
QueriesOption = Annotated[
    int | None,
    typer.Option(
        "--queries", min=1, show_default=str(QUERIES), help="Tokens after them, whose queries read the cache."
    ),
]
PromptQueriesOption = Annotated[
    int | None,
    typer.Option(
        "--prompt-queries",
        min=0,
        show_default=str(PROMPT_QUERIES),
        help="Last queries of the cached tokens that a method may look at.",
    ),
]


def draw_ensemble(text: str, sequences: Sequence[int] = (0,)) -> list[KvTensors]:
    """Draw sequences of ``NAME(field=value,...):SEED``; their source names the preset."""
    from kvsim.tensors.ensemble import draw, parse_ensemble

    spec, seed = parse_ensemble(text)
    name = text.partition("(")[0].partition(":")[0].strip()
    return [draw(spec, seed, sequence=sequence, name=name) for sequence in sequences]


def capture_texts(
    model: str,
    texts: Sequence[Path],
    tokens: int | None,
    queries: int | None,
    prompt_queries: int | None,
    signals: Collection[SignalName],
) -> tuple[list[Captured], Any]:
    """Let the model read each text by itself; give what it kept of each, and the model."""
    from kvsim.quality.capture import capture, encode_text, load_model, read_text
    from kvsim.quality.capture_signals import Requests

    cached = TOKENS if tokens is None else tokens
    later = QUERIES if queries is None else queries
    window = min(PROMPT_QUERIES, cached) if prompt_queries is None else prompt_queries
    for text in texts:
        read_text(text)  # A large model takes minutes to load.
    loaded, tokenizer = load_model(model)
    captured = [
        capture(
            loaded,
            encode_text(tokenizer, text, cached + later),
            num_queries=later,
            num_prompt_queries=window,
            source=f"{model}, {text.name}",
            signals=signals,
            requests=Requests.encoded(tokenizer),
        )
        for text in texts
    ]
    return captured, loaded
