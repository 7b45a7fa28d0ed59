"""``kvsim check``: what a vLLM server logged at its start beside what kvsim predicts for it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsim.cli.boundary import naming_file
from kvsim.cli.console import print_json, print_notes, print_result
from kvsim.cli.flags import ScenarioFlags, read_scenario_over, takes_scenario
from kvsim.errors import LogMismatch

if TYPE_CHECKING:
    from kvsim.log_check import LogCheck
    from kvsim.vllm_log import VllmLog

QUANTISED = ("fp8", "fp4", "awq", "gptq", "int4", "int8", "w4a16", "w8a8", "bnb", "gguf", "quant")


@takes_scenario
def check_command(
    flags: ScenarioFlags,
    vllm_log: Annotated[Path, typer.Option("--vllm-log", help="Log of a vLLM server, from its start.")],
    tolerance: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Largest error of the KV block count that exits with 0.")
    ] = 0.01,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Compare memory and KV blocks with a vLLM log; without a scenario file the log gives the scenario."""
    from kvsim.log_check import check_log
    from kvsim.vllm_log import read_vllm_log

    log = read_vllm_log(vllm_log)
    document, notes = _document(log, flags)
    scenario = read_scenario_over(flags, document, str(flags.file or vllm_log))
    notes += _other_model(log, scenario.model)
    with naming_file(flags.file or vllm_log):
        check = check_log(log, scenario, tuple(notes), tolerance=tolerance, base_dir=flags.base_dir)
    print_notes(check.notes)
    if as_json:
        print_json(_as_json(check))
    else:
        from kvsim.rendering.log_check import log_check_view

        print_result(log_check_view(check, vllm_log.name))
    if not check.passed:
        msg = f"{check.decisive} differ by {check.error:+.2%}, more than {check.tolerance:.2%}"
        raise LogMismatch(msg)


def _document(log: VllmLog, flags: ScenarioFlags) -> tuple[dict[str, Any], list[str]]:
    """The scenario file's document, or the one that the log stands for."""
    if flags.file is not None:
        from kvsim.scenario_file import load_document

        return load_document(flags.file), []
    from kvsim.log_check import log_scenario

    document, notes = log_scenario(log, flags.device, flags.model)
    preset = _same_shapes(document["model"])
    if preset is not None:
        notes.append(f"{document['model']} is taken as the preset {preset}, whose layers have its shapes; else --model")
        document["model"] = preset
    return document, notes


def _other_model(log: VllmLog, model: str) -> list[str]:
    """Say so where the scenario's model and the log's are two different presets."""
    from kvsim.validation.deployments import find_preset

    logged = log.options.get("model")
    if not logged:
        return []
    named = find_preset(str(logged))
    if named is None or find_preset(model) in (None, named):
        return []
    return [f"model is {model} in the scenario and {logged} in the log"]


def _same_shapes(model: str) -> str | None:
    """Preset of a model that is neither a preset nor a file here; None for quantised ones, whose names say too little.

    Servers are given base models, local folders and other spellings, and nothing should be fetched for those.
    """
    from kvsim.model_catalog import list_models, preset_hub_ids
    from kvsim.validation.deployments import find_preset

    key = model.lower()
    if key in list_models() or key in preset_hub_ids() or Path(model).exists():
        return None
    return None if any(word in key for word in QUANTISED) else find_preset(model)


def _as_json(check: LogCheck) -> dict[str, Any]:
    figures = [{**asdict(figure), "error": figure.error} for figure in check.figures]
    return {
        "passed": check.passed,
        "decisive": check.decisive,
        "tolerance": check.tolerance,
        "figures": figures,
        "notes": list(check.notes),
        "scenario": check.scenario.model_dump(mode="json"),
    }
