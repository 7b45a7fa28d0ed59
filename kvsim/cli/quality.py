"""``kvsim quality``: the risk of strategies, by theory, measured on tensors, and as published."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsim.cli.console import (
    joined_names,
    notice,
    print_json,
    print_notes,
    print_result,
    print_text,
    progress_bar,
    stdout_width,
    timed,
)
from kvsim.cli.kv_options import (
    EnsembleOption,
    KvOption,
    PromptQueriesOption,
    QueriesOption,
    TokensOption,
    capture_texts,
    draw_ensemble,
)
from kvsim.errors import IncompatibleScenario, InvalidSpec

if TYPE_CHECKING:
    from kvsim.quality.capture import Captured
    from kvsim.quality.run import Continue, StrategyRisk
    from kvsim.tensors import KvTensors, SignalName

    Samples = Callable[[], Sequence[KvTensors]]

DEFAULT_STRATEGIES = "native,fp8,int4_per_token_head,kivi-4,kivi-2,turboquant_4bit_nc,turboquant_3bit_nc,snapkv:0.5"
CALIBRATION_SEQUENCES = (1, 2)
quality_app = typer.Typer(no_args_is_help=True, help="Risk of strategies: theory, measured on tensors, published.")


TextOption = Annotated[Path | None, typer.Option("--text", metavar="FILE", help="What the model reads: UTF-8.")]


@quality_app.command("run")
def run_command(
    kv: KvOption = None,
    ensemble: EnsembleOption = None,
    model: Annotated[
        str | None, typer.Option(metavar="PATH_OR_ID", help="Capture them, and let the model continue (capture extra).")
    ] = None,
    text: TextOption = None,
    tokens: TokensOption = None,
    queries: QueriesOption = None,
    prompt_queries: PromptQueriesOption = None,
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
    from kvsim.quality.run import needed_signals, run_strategies

    if as_json and as_csv:
        msg = "--json and --csv exclude each other"
        raise InvalidSpec(msg)
    if (kv, ensemble, model).count(None) != 2 or (model is None) != (text is None):
        msg = "give one of --kv FILE.safetensors, --ensemble NAME[:SEED], and --model PATH_OR_ID with --text FILE"
        raise InvalidSpec(msg)
    if model is None and (tokens, queries, prompt_queries) != (None, None, None):
        msg = "--tokens, --queries and --prompt-queries go with --model; a file has its own, an ensemble has fields"
        raise InvalidSpec(msg)
    names = parse_strategies(strategies)
    signals = needed_signals(names)
    continuation: Continue | None = None
    if model is not None and text is not None:
        (captured,), loaded = capture_texts(model, [text], tokens, queries, prompt_queries, signals)
        cache, continuation = captured.kv, _continuation(loaded, captured)
        samples = _calibration_files(cache, calibrate or (), needed_signals(names, to_fit=True))
    elif kv is not None:
        from kvsim.tensors.files import read_kv

        cache = read_kv(kv, signals)
        samples = _calibration_files(cache, calibrate or (), needed_signals(names, to_fit=True))
    else:
        cache, samples = _drawn(str(ensemble), calibrate or ())
    with timed(f"ran {len(names)} strategies on {cache.source}"), progress_bar("storing") as progress:
        rows = run_strategies(cache, names, samples, continuation, progress, amid=ensemble is not None)
    _show(rows, cache, heads=heads, as_json=as_json, as_csv=as_csv)
    if all(row.measured is None for row in rows):
        msg = f"none of the {len(rows)} strategies can run: {rows[0].strategy}: {rows[0].reason}"
        raise IncompatibleScenario(msg)


@quality_app.command("capture")
def capture_command(
    model: Annotated[str, typer.Option(metavar="PATH_OR_ID", help="Hugging Face causal language model.")],
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="What the model reads: UTF-8.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where to: .safetensors.")],
    tokens: TokensOption = None,
    queries: QueriesOption = None,
    prompt_queries: PromptQueriesOption = None,
    signals: Annotated[
        str,
        typer.Option(
            metavar="NAMES", help="What else to record: hidden, repeat_queries, entropy, distance (commas between)."
        ),
    ] = "",
) -> None:
    """Record K, V and Q of a Hugging Face model while it reads a text (capture extra)."""
    from kvsim.documents import check_output_path
    from kvsim.tensors.files import SUFFIX, write_kv

    check_output_path(out, (SUFFIX,))
    wanted = _parse_signals(signals)
    with timed(f"captured {out}"):
        (captured,), _ = capture_texts(model, [text], tokens, queries, prompt_queries, wanted)
        write_kv(captured.kv, out)


def _parse_signals(text: str) -> frozenset[SignalName]:
    """Names with commas between them; raise UnknownName for what `capture` does not record."""
    from kvsim.errors import UnknownName
    from kvsim.quality.capture import SIGNALS

    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in SIGNALS:
            raise UnknownName(kind="signal", name=name, known=SIGNALS)
    return frozenset(name for name in SIGNALS if name in names)


def _continuation(loaded: Any, captured: Captured) -> Continue:
    from kvsim.quality.continuation import continue_with

    return partial(continue_with, loaded, captured)


def _calibration_files(cache: KvTensors, paths: Sequence[Path], signals: Collection[SignalName]) -> Samples:
    """Read calibration sequences when a method asks for them; refuse those of another model."""
    from kvsim.tensors.files import read_kv

    def read() -> list[KvTensors]:
        samples = [read_kv(path, signals) for path in paths]
        for path, sample in zip(paths, samples, strict=True):
            if _shape(sample) != _shape(cache):
                msg = f"--calibrate {path}: layers, heads or dimensions {_shape(sample)} are not {_shape(cache)}"
                raise InvalidSpec(msg)
        return samples

    return read


def _shape(kv: KvTensors) -> tuple[int, ...]:
    layer = kv.layers[0]
    return kv.num_layers, layer.num_kv_heads, layer.keys.shape[2], layer.values.shape[2]


def _drawn(ensemble: str, calibrate: Sequence[Path]) -> tuple[KvTensors, Samples]:
    """Draw a sequence, and others of the same model when a method calibrates."""
    if calibrate:
        msg = "--calibrate goes with --kv and --model; an ensemble calibrates on its own sequences 1 and 2"
        raise InvalidSpec(msg)
    (cache,) = draw_ensemble(ensemble)
    return cache, lambda: draw_ensemble(ensemble, CALIBRATION_SEQUENCES)


def _show(rows: Sequence[StrategyRisk], cache: KvTensors, *, heads: bool, as_json: bool, as_csv: bool) -> None:
    from kvsim.rendering.quality import WIDTH_FOR_ALL, head_table, risk_csv, risk_document, risk_table

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
    width = stdout_width()
    print_result(risk_table(rows, f"{cache.source}: {shape}, {layer.queries.shape[1]} queries", width))
    if width < WIDTH_FOR_ALL:
        notice(f"below {WIDTH_FOR_ALL} columns only some figures are shown; widen the terminal, or take --csv")
    if heads:
        for row in rows:
            if row.measured is not None:
                print_result(head_table(row))
    for line in joined_names(_told(rows, cache.num_layers)):
        notice(line)
    print_notes(_notes(rows))


def _told(rows: Sequence[StrategyRisk], num_layers: int) -> Iterator[str]:
    """What must be known of single strategies, as ``NAME: reason``."""
    from kvsim.quality.amid import exempt_note

    for row in rows:
        if row.reason is not None:
            yield f"{row.strategy}: did not run: {row.reason}"
        if row.native_layers:
            left = f"{row.native_layers} of {num_layers} layers"
            yield f"{row.strategy}: {left} stay native by its own rule, more than in a deep model"
        if row.outer_layers:
            yield f"{row.strategy}: {exempt_note(row.outer_layers)}"
        if row.theory_reason is not None:
            yield f"{row.strategy}: no theory, {row.theory_reason}"


def _notes(rows: Sequence[StrategyRisk]) -> list[str]:
    from kvsim.quality.theory import CAUTIONS
    from kvsim.rendering.quality import SHORT

    met = dict.fromkeys(name for row in rows if row.theory for name in row.theory.cautions)
    return [
        "theory, measured and published are three kinds of risk, and none is the accuracy of a task (docs/quality.md)",
        "output: error of attention outputs beside the outputs; logit: root mean square change of logits",
        *(f"caution {SHORT[name]} ({name}): {CAUTIONS[name]}" for name in met),
    ]
