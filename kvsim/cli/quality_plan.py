"""``kvsim quality plan``: give each layer a policy and a budget of its own, and keep that as a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvsim.cli.console import notice, print_json, print_notes, print_result, progress_bar, timed
from kvsim.cli.kv_options import (
    EnsembleOption,
    PromptQueriesOption,
    QueriesOption,
    TokensOption,
    capture_texts,
    draw_ensemble,
)
from kvsim.errors import InvalidSpec

if TYPE_CHECKING:
    from kvsim.quality.capture import Captured
    from kvsim.quality.plan_runs import Budget, Harm, MadePlan
    from kvsim.tensors import KvTensors, SignalName

DEFAULT_CANDIDATES = "streaming_llm,snapkv,h2o"
HELD_OUT = 2
"""Sequences of an ensemble that a plan is tested on."""
NOTE = (
    "PolyKV-style (arXiv 2606.15157): the paper's own algorithm is not public here; a plan needs new calibration for "
    "other tasks and models (docs/layer-plans.md)"
)


def plan_layers_command(
    *,
    ensemble: EnsembleOption = None,
    kv: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="KV tensors to calibrate on: .safetensors. Repeatable.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="PATH_OR_ID", help="Capture them from a Hugging Face model (capture extra).")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="What the model reads to calibrate: UTF-8. Repeatable.")
    ] = None,
    test: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Held-out .safetensors, or texts with --model. Repeatable."),
    ] = None,
    candidates: Annotated[
        str, typer.Option("--candidates", "-c", help="Token selections, or encodings, with commas between them.")
    ] = DEFAULT_CANDIDATES,
    keep: Annotated[float | None, typer.Option(help="Share of the prompt that layers keep on average.")] = None,
    bits: Annotated[float | None, typer.Option(help="Bits per element that layers take on average, at most.")] = None,
    by: Annotated[
        Literal["kl", "local"] | None,
        typer.Option("--by", help="kl: what the model says next (--model); local: each layer's own output."),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of an ensemble to calibrate on.")] = 4,
    tokens: TokensOption = None,
    queries: QueriesOption = None,
    prompt_queries: PromptQueriesOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="PLAN.yaml", help="Where to write the plan.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Measure what each candidate does to each layer alone, and give layers what does least harm at a fixed total."""
    from kvsim.cli.compare import split_names
    from kvsim.documents import check_output_path
    from kvsim.quality.plan_runs import Budget
    from kvsim.quality.run import needed_signals

    if [bool(one) for one in (ensemble, kv, model)].count(True) != 1 or bool(model) != bool(text):
        msg = "give one of --ensemble NAME[:SEED], --kv FILE.safetensors, and --model PATH_OR_ID with --text FILE"
        raise InvalidSpec(msg)
    if by == "kl" and model is None:
        msg = "--by kl asks a model what it says next: give --model and --text, or --by local"
        raise InvalidSpec(msg)
    if out is not None:
        check_output_path(out, (".yaml", ".yml"))
    budget = Budget(keep=0.25 if keep is None and bits is None else keep, bits=bits)
    names = split_names(candidates)
    with timed("planned"), progress_bar("measuring") as progress:
        if model is not None:
            sizes = (tokens, queries, prompt_queries)
            made, source = _by_model(model, text or (), test or (), names, budget, by or "kl", sizes, progress)
        else:
            caches, held_out, source = _caches(ensemble, kv or (), test or (), sequences, needed_signals(names))
            from kvsim.quality.plan_runs import plan_from_caches

            made = plan_from_caches(caches, names, budget, held_out=held_out, progress=progress)
            source += "; by local output deviation"
    total = f"keep {budget.keep:g} of the prompt" if budget.keep is not None else f"{budget.bits:g} bits per element"
    _show(made, f"{source}; total: {total} per layer", out, as_json=as_json)


def _caches(
    ensemble: str | None, kv: Sequence[Path], test: Sequence[Path], sequences: int, signals: frozenset[SignalName]
) -> tuple[list[KvTensors], list[KvTensors], str]:
    from kvsim.tensors.files import read_kv

    if ensemble is None:
        return [read_kv(path, signals) for path in kv], [read_kv(path, signals) for path in test], _names(kv)
    if test:
        msg = "--test goes with --kv and --model; an ensemble is tested on sequences of its own"
        raise InvalidSpec(msg)
    drawn = draw_ensemble(ensemble, range(1, sequences + HELD_OUT + 1))
    return drawn[:sequences], drawn[sequences:], f"ensemble {ensemble}, {sequences} sequences"


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths)


def _by_model(
    model: str,
    texts: Sequence[Path],
    test: Sequence[Path],
    names: tuple[str, ...],
    budget: Budget,
    by: Literal["kl", "local"],
    sizes: tuple[int | None, int | None, int | None],
    progress: Any,
) -> tuple[MadePlan, str]:
    from kvsim.quality.plan_runs import options_for, plan_by_kl, plan_from_caches
    from kvsim.quality.run import needed_signals

    captured, loaded = capture_texts(model, (*texts, *test), *sizes, needed_signals(names))
    calibration, held_out = captured[: len(texts)], captured[len(texts) :]
    caches = [one.kv for one in calibration]
    source = f"{Path(model).name}, {_names(texts)}; by {'final-logit KL' if by == 'kl' else 'local output deviation'}"
    if by == "local":
        tested = [one.kv for one in held_out]
        return plan_from_caches(caches, names, budget, held_out=tested, progress=progress), source
    options = options_for(names, budget, caches[0])
    unseen = _mean_kl(loaded, held_out, caches) if held_out else None
    seen = _mean_kl(loaded, calibration, caches)
    made = plan_by_kl(seen, options, caches[0].num_layers, budget, held_out=unseen, progress=progress)
    return made, source


def _mean_kl(loaded: Any, captured: Sequence[Captured], samples: Sequence[KvTensors]) -> Harm:
    from kvsim.quality.continuation import continue_with
    from kvsim.quality.store import fit_strategy, needs_calibration, store_cache

    def harm(compression: Any) -> float:
        fitted = fit_strategy(compression, samples if needs_calibration(compression) else ())
        found = [continue_with(loaded, one, compression, store_cache(fitted, one.kv)).mean_kl for one in captured]
        return sum(found) / len(found)

    return harm


def _show(made: MadePlan, source: str, out: Path | None, *, as_json: bool) -> None:
    from kvsim.compression.plan_file import plan_of, write_plan
    from kvsim.rendering.layer_plans import plan_advice, plan_document, plan_table

    document = plan_document(made)
    if out is not None:
        evidence = {key: value for key, value in document.items() if key not in ("layers", "strategy")}
        write_plan(out, plan_of(made.compression, out.stem, source, evidence))
        notice(f"wrote {out}")
    if as_json:
        print_json({"source": source, **document})
        return
    print_result(plan_table(made, source))
    advice = plan_advice(made)
    print_notes([NOTE, *([advice] if advice else [])])
