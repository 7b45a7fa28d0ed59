"""``kvsim edge``: what fits on this phone or laptop, how fast it answers, and how long its battery lasts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvsim.cli.boundary import naming_file
from kvsim.cli.console import print_json, print_notes, print_result, stdout_width, timed
from kvsim.cli.flags import ScenarioFlags, read_scenario_over, takes_scenario
from kvsim.errors import InfeasibleScenario, InvalidSpec

if TYPE_CHECKING:
    from kvsim.edge import EdgeQuestion

DEFAULT_STRATEGIES = "native,q8_0,q5_1,q4_0,snapkv,snapkv+q8_0,streaming_llm:1024"
DEFAULTS = {"workload": "phone-assistant", "engine": {"kind": "llamacpp", "max_num_seqs": 1}}


@takes_scenario
def edge_command(
    flags: ScenarioFlags,
    strategies: Annotated[str, typer.Option("--strategies", "-s", help="Names with commas between them.")] = (
        DEFAULT_STRATEGIES
    ),
    reading_speed: Annotated[
        float | None,
        typer.Option(help="Tokens per second below which an answer is too slow.", show_default="5.3, silent reading"),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Context that rates and energy are given at.", show_default="the longest"),
    ] = None,
    battery: Annotated[str | None, typer.Option(help="Capacity of the battery, such as '53.8 Wh'.")] = None,
    power: Annotated[str | None, typer.Option(help="Power while decoding, such as '4.5 W'.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Say what fits on a phone or laptop: longest context, speed, energy per token, minutes of battery."""
    from kvsim.cli.compare import parse_strategies
    from kvsim.edge import edge_answers
    from kvsim.scenario_file import load_document

    document = load_document(flags.file) if flags.file is not None else dict(DEFAULTS)
    scenario = read_scenario_over(flags, document, str(flags.file) if flags.file is not None else "command line")
    question = _question(reading_speed, context, battery, power)
    with naming_file(flags.file), timed("answered"):
        answers = edge_answers(scenario, parse_strategies(strategies), question, base_dir=flags.base_dir)
    print_notes(dict.fromkeys(note for answer in answers for note in answer.notes))
    if as_json:
        print_json([answer.model_dump(mode="json") for answer in answers])
    else:
        from kvsim.rendering.edge import edge_view

        print_result(edge_view(answers, question.reading_tokens_per_s, stdout_width()))
    if all(answer.reason is not None for answer in answers):
        msg = f"none of the {len(answers)} strategies can run: {answers[0].reason}"
        raise InfeasibleScenario(msg)


def _question(reading_speed: float | None, context: int | None, battery: str | None, power: str | None) -> EdgeQuestion:
    from kvsim.edge import READING_TOKENS_PER_S, EdgeQuestion
    from kvsim.units import parse_joules, parse_watts

    try:
        battery_j = None if battery is None else parse_joules(battery)
        power_w = None if power is None else parse_watts(power)
    except ValueError as error:
        msg = f"--{'power' if 'power' in str(error) else 'battery'}: {error}"
        raise InvalidSpec(msg) from None
    return EdgeQuestion(READING_TOKENS_PER_S if reading_speed is None else reading_speed, context, battery_j, power_w)
