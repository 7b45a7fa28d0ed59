"""``kvsim quality``: the risk of strategies, by theory, measured on tensors, and as published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvsim.cli.console import notice, print_json, print_notes, print_result, print_text, timed
from kvsim.errors import IncompatibleScenario, InvalidSpec

if TYPE_CHECKING:
    from kvsim.quality.run import Continue, StrategyRisk
    from kvsim.tensors import KvTensors

DEFAULT_STRATEGIES = "native,fp8,int4_per_token_head,kivi-4,kivi-2,turboquant_4bit_nc,turboquant_3bit_nc,snapkv:0.5"
CALIBRATION_SEQUENCES = (1, 2)
quality_app = typer.Typer(no_args_is_help=True, help="Risk of strategies: theory, measured on tensors, published.")


@quality_app.command("run")
def run_command(
    kv: Annotated[Path | None, typer.Option("--kv", metavar="FILE", help="KV tensors: .safetensors.")] = None,
    ensemble: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:SEED]",
            help="Draw them: llama-like, heavy-keys, retrieval or diffuse, with (field=value,...).",
        ),
    ] = None,
    strategies: Annotated[
        str, typer.Option("--strategies", "-s", help="Names with commas between them, or all.")
    ] = DEFAULT_STRATEGIES,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Other sequences of the model, for methods that calibrate. Repeatable."),
    ] = None,
    heads: Annotated[bool, typer.Option("--heads", help="Also every layer and query head.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV and nothing else.")] = False,
) -> None:
    """Store a KV cache as each strategy would, let its queries read it, and show the harm beside what theory says."""
    from kvsim.cli.compare import parse_strategies
    from kvsim.quality.run import run_strategies

    if as_json and as_csv:
        msg = "--json and --csv exclude each other"
        raise InvalidSpec(msg)
    names = parse_strategies(strategies)
    cache, samples, continuation = _input(kv, ensemble, calibrate or ())
    with timed(f"ran {len(names)} strategies on {cache.source}"):
        rows = run_strategies(cache, names, samples, continuation)
    _show(rows, cache, heads=heads, as_json=as_json, as_csv=as_csv)
    if all(row.measured is None for row in rows):
        msg = f"none of the {len(rows)} strategies can run: {rows[0].strategy}: {rows[0].reason}"
        raise IncompatibleScenario(msg)


def _input(
    kv: Path | None, ensemble: str | None, calibrate: Sequence[Path]
) -> tuple[KvTensors, Callable[[], Sequence[KvTensors]], Continue | None]:
    """Give the cache, where others for calibration come from, and how to run the model on."""
    if (kv is None) == (ensemble is None):
        msg = "give one of --kv FILE.safetensors and --ensemble NAME[:SEED]"
        raise InvalidSpec(msg)
    from kvsim.tensors.files import read_kv

    if kv is not None:
        return read_kv(kv), lambda: [read_kv(path) for path in calibrate], None
    from kvsim.tensors.ensemble import draw, parse_ensemble

    if calibrate:
        msg = "--calibrate goes with --kv; an ensemble calibrates on its own sequences 1 and 2"
        raise InvalidSpec(msg)
    spec, seed = parse_ensemble(str(ensemble))
    return (
        draw(spec, seed, name=str(ensemble).partition("(")[0].partition(":")[0]),
        lambda: [draw(spec, seed, sequence=sequence) for sequence in CALIBRATION_SEQUENCES],
        None,
    )


def _show(rows: Sequence[StrategyRisk], cache: KvTensors, *, heads: bool, as_json: bool, as_csv: bool) -> None:
    from kvsim.rendering.quality import head_table, risk_csv, risk_document, risk_table

    if as_csv:
        print_text(risk_csv(rows, heads=heads).removesuffix("\n"))
        return
    layer = cache.layers[0]
    if as_json:
        print_json(
            {
                "source": cache.source,
                "num_layers": cache.num_layers,
                "num_kv_heads": layer.num_kv_heads,
                "num_tokens": layer.num_tokens,
                "num_queries": layer.queries.shape[1],
                "strategies": [risk_document(row, heads=heads) for row in rows],
            }
        )
        return
    shape = f"{cache.num_layers} layers, {layer.num_kv_heads} KV heads, {layer.num_tokens} tokens"
    print_result(risk_table(rows, f"{cache.source}: {shape}, {layer.queries.shape[1]} queries"))
    if heads:
        for row in rows:
            if row.measured is not None:
                print_result(head_table(row))
    for row in rows:
        if row.reason is not None:
            notice(f"{row.strategy} did not run: {row.reason}")
    print_notes(_notes(rows))


def _notes(rows: Sequence[StrategyRisk]) -> list[str]:
    from kvsim.quality.theory import CAUTIONS

    met = dict.fromkeys(name for row in rows if row.theory for name in row.theory.cautions)
    return [
        "theory, measured and published are three kinds of risk, and none is the accuracy of a task (docs/quality.md)",
        *(f"{name}: {CAUTIONS[name]}" for name in met),
    ]
