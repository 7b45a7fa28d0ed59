"""``kvsim limit``: the per-vector Shannon limit of KV tensors, and how far encodings are from it."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvsim.cli.console import notice, print_json, print_notes, print_result, progress_bar, stdout_width, timed
from kvsim.errors import InvalidSpec

if TYPE_CHECKING:
    from kvsim.limit import LimitAnswer
    from kvsim.limit.source import Source


def limit_command(
    kv: Annotated[
        list[Path] | None, typer.Option("--kv", help="KV tensors to measure: .safetensors. Repeatable.")
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option("--calibrate", help="Other sequences of the same model, for codecs that learn. Repeatable."),
    ] = None,
    ensemble: Annotated[
        str | None,
        typer.Option(
            help="Seeded ensemble instead of files: NAME, NAME:SEED or NAME(field=value):SEED.",
            show_default="llama-like(num_layers=6,num_tokens=2048)",
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, max=64, help="Sequences of the ensemble to measure.")] = 1,
    strategies: Annotated[
        str | None,
        typer.Option(
            "--strategies", "-s", help="Names with commas between them.", show_default="all that keep every token"
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Model of the token-id tier.")] = "llama-3.1-8b",
    device: Annotated[str, typer.Option(help="Device that its prefill is priced on.")] = "h100-sxm",
    context: Annotated[int, typer.Option(min=1, help="Tokens to compute again.")] = 8192,
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", "-tp", min=1)] = 1,
    out: Annotated[Path | None, typer.Option("--csv", help="Also write one row per encoding: .csv.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show the rate-distortion limit of KV tensors, every encoding's gap to it, and what token ids alone would cost."""
    from kvsim.cli.compare import parse_strategies
    from kvsim.documents import check_output_path, write_output

    if kv and ensemble is not None:
        msg = "--kv and --ensemble exclude each other"
        raise InvalidSpec(msg)
    if out is not None:
        check_output_path(out, (".csv",))
    names = parse_strategies(strategies) if strategies is not None else None
    answer = _find(_source(kv, calibrate, ensemble, sequences), names, model, device, context, tensor_parallel_size)
    if out is not None:
        write_output(out, _csv(answer).encode())
    print_notes(answer.notes)
    if as_json:
        print_json(answer.model_dump(mode="json"))
        return
    from kvsim.rendering.limit import limit_view

    print_result(limit_view(answer, stdout_width()))


def _source(kv: list[Path] | None, samples: list[Path] | None, ensemble: str | None, sequences: int) -> Source:
    from kvsim.limit.source import DEFAULT_ENSEMBLE, from_ensemble, from_files

    if kv:
        return from_files(kv, samples or ())
    if samples:
        msg = "--calibrate goes with --kv; an ensemble draws sequences of its own for that"
        raise InvalidSpec(msg)
    return from_ensemble(ensemble or DEFAULT_ENSEMBLE, sequences)


def _find(
    source: Source, names: tuple[str, ...] | None, model: str, device: str, context: int, tensor_parallel_size: int
) -> LimitAnswer:
    from kvsim.limit import find_limit, token_id_tier

    token_ids = token_id_tier(model, device, context, tensor_parallel_size)
    with timed("measured"), progress_bar("measuring") as progress:
        answer = find_limit(source.caches, source.samples, names, token_ids=token_ids, progress=progress)
    if not answer.points:
        notice("no encoding could be measured; reasons are in the table")
    return answer


def _csv(answer: LimitAnswer) -> str:
    from kvsim.limit import EncodingPoint

    text = io.StringIO()
    rows = csv.DictWriter(text, fieldnames=[*EncodingPoint.model_fields, "reason"], lineterminator="\n")
    rows.writeheader()
    rows.writerows(point.model_dump(mode="json") for point in answer.points)
    rows.writerows({"strategy": one.strategy, "reason": one.reason} for one in answer.not_measured)
    return text.getvalue()
