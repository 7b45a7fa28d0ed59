"""``kvsim risk``: how compressible a KV cache is, and which heads break first."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kvsim.cli.console import (
    notice,
    print_json,
    print_notes,
    print_result,
    print_text,
    progress_bar,
    stdout_width,
    timed,
)
from kvsim.cli.kv_options import EnsembleOption, KvOption, draw_ensemble
from kvsim.errors import InvalidSpec

if TYPE_CHECKING:
    from pathlib import Path

    from kvsim.quality.risk.compressibility import Compressibility
    from kvsim.tensors import KvTensors

_SHARE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*%")
NOTES: Final = (
    "errors are root mean squares of output changes beside outputs, of no task (docs/risk.md)",
    "* by formula: random eviction by finite influence, and by (1 - K/n) tr(Sigma)/K; all else is measured",
)


def risk_command(
    kv: KvOption = None,
    ensemble: EnsembleOption = None,
    error: Annotated[float, typer.Option(help="Relative output error that entries are counted for.")] = 0.01,
    budget: Annotated[
        str, typer.Option(metavar="K|SHARE%", help="Entries per KV head at which heads are compared.")
    ] = "25%",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a line per KV head, and nothing else.")] = False,
) -> None:
    """Say how compressible a KV cache is: entries for an output error, and which layers and heads break first."""
    from kvsim.quality.risk.compressibility import compressibility

    if as_json and as_csv:
        msg = "--json and --csv exclude each other"
        raise InvalidSpec(msg)
    if not 0.0 < error < 1.0:
        msg = f"--error {error:g}: a relative error between 0 and 1, such as 0.01"
        raise InvalidSpec(msg)
    cache = _cache(kv, ensemble)
    atoms = _atoms(budget, cache.layers[0].num_tokens)
    with timed(f"measured {cache.source}"), progress_bar("measuring") as progress:
        answer = compressibility(cache, error, atoms, progress)
    _show(answer, as_json=as_json, as_csv=as_csv)


def _cache(kv: Path | None, ensemble: str | None) -> KvTensors:
    if (kv is None) == (ensemble is None):
        msg = (
            "give one of --kv FILE.safetensors and --ensemble NAME[:SEED]; `kvsim quality capture` writes such a file "
            "from a model"
        )
        raise InvalidSpec(msg)
    if kv is not None:
        from kvsim.tensors.files import read_kv

        return read_kv(kv)
    (drawn,) = draw_ensemble(str(ensemble))
    return drawn


def _atoms(text: str, tokens: int) -> int:
    """Entries per KV head that ``--budget`` stands for."""
    share = _SHARE.fullmatch(text.strip())
    if share is not None and 0.0 < float(share[1]) <= 100.0:
        return max(1, int(tokens * float(share[1]) / 100.0))
    if text.strip().isdecimal() and int(text) > 0:
        return min(tokens, int(text))
    msg = f"--budget {text!r}: entries per KV head, such as 256, or a share of them such as 25%"
    raise InvalidSpec(msg)


def _show(answer: Compressibility, *, as_json: bool, as_csv: bool) -> None:
    from kvsim.rendering.compressibility import WIDTH_FOR_ALL, risk_csv, risk_document, risk_table, verdict

    if as_csv:
        print_text(risk_csv(answer).removesuffix("\n"))
        return
    if as_json:
        print_json(risk_document(answer))
        return
    width = stdout_width()
    print_result(risk_table(answer, width))
    for sentence in verdict(answer):
        print_text(sentence)
    if width < WIDTH_FOR_ALL:
        notice(f"below {WIDTH_FOR_ALL} columns only some figures are shown; widen the terminal, or take --csv")
    if not answer.query_aware:
        notice("the cache has no prompt_queries: profiles are those of isotropic queries (query-agnostic)")
    print_notes(NOTES)
