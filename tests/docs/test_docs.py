"""Documents are true: links resolve, commands run, and tables name what the code has."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import typer.main
from pydantic import BaseModel
from typer.testing import CliRunner

from kvsim import __version__
from kvsim.adaptive import Adaptive, AdaptiveLevel
from kvsim.batch import SweepSpec
from kvsim.cli import build_app
from kvsim.cli.compare import parse_strategies
from kvsim.compression import ENCODINGS, PLANS, REDUCTIONS, SELECTIONS, STRATEGIES, parse_compression
from kvsim.documents import parse_yaml, validate
from kvsim.metrics import METRICS
from kvsim.planner import Budget, PlanRequest, Search
from kvsim.rendering import comparison_markdown
from kvsim.scenario import Scenario, Slo
from kvsim.scenario_file import load_scenario
from kvsim.simulate import Comparison, compare, simulate
from kvsim.specs import workload
from kvsim.specs.adaptive import ClassLevels, Policy, Requantize
from kvsim.specs.base import Basis
from kvsim.specs.disaggregation import Disaggregation, PoolSpec
from kvsim.specs.engine import EngineSpec, SamplingSpec
from kvsim.specs.price import Price
from kvsim.specs.routing import RouterThresholds
from kvsim.specs.tier import HostTier, NvmeTier, RecomputeTier, RemoteTier
from kvsim.workload_catalog import list_workloads

CHECKOUT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").rglob("*.md")])
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
CHEAP = ("list", "estimate", "explain")
MAX_PICTURE_BYTES = 300_000


def text_of(name: str) -> str:
    return (CHECKOUT / name).read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return path.relative_to(CHECKOUT).as_posix()


def shell_blocks(text: str) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def example_commands() -> list[tuple[str, str]]:
    """(document, arguments) of every kvsim command that is shown, in a block or inline."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        shown = [block.partition("kvsim ")[2] for block in shell_blocks(text) if re.search(r"(^|/)kvsim ", block)]
        shown += re.findall(r"`kvsim ((?:simulate|estimate|compare|sweep|explain|list) [^`]*)`", text)
        found += [(name_of(path), arguments.strip()) for arguments in shown]
    return [(name, arguments) for name, arguments in found if not re.search(r"[A-Z]{4}|…", arguments)]


# --- links, blocks, pictures, names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_relative_links_resolve(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file) if file else path
        assert linked.exists(), f"{target} is missing"
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), f"{target} has no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_shell_blocks_are_single_lines_and_no_machine_is_named(path):
    text = path.read_text(encoding="utf-8")
    for block in shell_blocks(text):
        assert block.count("\n") == 1
        assert "\\" not in block
    assert not re.search(r"(?<![\w.])/(work|tmp|root|home)/", text)


def test_pictures_are_small_png_files():
    pictures = list((CHECKOUT / "docs" / "images").iterdir())
    assert pictures
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size < MAX_PICTURE_BYTES


def test_licence_is_apache_2_with_its_appendix():
    words = text_of("LICENSE").split()
    assert words[:5] == ["Apache", "License", "Version", "2.0,", "January"]
    assert "APPENDIX: How to apply the Apache License to your work." in text_of("LICENSE")


# --- commands -------------------------------------------------------------------------------------------------------


def test_commands_are_found():
    commands = [arguments.split()[0] for _, arguments in example_commands()]
    assert set(commands) >= {"list", "estimate", "explain", "simulate", "compare", "sweep", "calibrate"}


@pytest.mark.parametrize(("document", "arguments"), example_commands())
def test_example_command_parses_and_runs_if_cheap(document, arguments, monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    words = shlex.split(arguments)
    for word in words:
        if word.endswith(".yaml"):
            assert (CHECKOUT / word).is_file(), f"{document} names {word}"
    if words[0] in CHEAP:
        result = CliRunner().invoke(build_app(), words)
        assert result.exit_code == 0, result.stderr
        assert result.stdout
    else:
        command = typer.main.get_command(build_app()).commands[words[0]]
        command.make_context(words[0], words[1:])


def test_first_command_has_eight_strategies_on_three_kinds_of_device():
    block = shell_blocks(README)[0]
    assert block.startswith('python3 -m venv .venv && .venv/bin/pip install -q ".[picture]" && .venv/bin/kvsim compare')
    strategies = parse_strategies(re.findall(r" -s (\S+)", block)[0])
    scenarios = [load_scenario(CHECKOUT / file) for file in re.findall(r"examples/\S+\.yaml", block)]
    assert len(strategies) >= 8
    assert [one.device for one in scenarios] == ["h100-sxm", "tpu-v6e", "snapdragon-8-gen-3"]
    assert re.findall(r"out/report\.\w+", block) == ["out/report.parquet", "out/report.html", "out/report.png"]


def test_second_command_runs_the_tests():
    assert shell_blocks(README)[1] == (
        'python3 -m venv .venv && .venv/bin/pip install -q -e ".[dev]" && .venv/bin/python -m pytest -n auto\n'
    )


@pytest.mark.parametrize(
    "command",
    ["simulate", "estimate", "compare", "sweep", "explain", "calibrate", "validate", "plan", "dashboard", "list"],
)
def test_every_flag_is_documented(command):
    text = text_of("docs/cli.md")
    assert f"| `{command}` |" in text
    for parameter in typer.main.get_command(build_app()).commands[command].params:
        for flag in parameter.opts:
            if flag.startswith("-"):
                assert re.search(rf"`{flag}[ `]", text), flag


def test_every_command_is_documented():
    text = text_of("docs/cli.md")
    root = typer.main.get_command(build_app())
    assert all(f"| `{name}` |" in text for name in root.commands)
    assert all(f"`list {name}`" in text for name in root.commands["list"].commands)


# --- tables that must not drift -------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.tag)
def test_metric_is_in_the_glossary_with_its_unit(metric):
    (row,) = [line for line in text_of("docs/glossary.md").splitlines() if line.startswith("|") and metric.tag in
              re.findall(r"`(\w+)`", line.rpartition(" | ")[0])]  # fmt: skip
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    allowed = {metric.unit} if metric.unit else {"", "share", "text"}
    assert allowed & set(cells), row


def section(text: str, heading: str) -> str:
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"no section {heading!r}"
    return found[2]


def shown_default(field) -> str | None:
    """What a table says of a field's default; None where it is a value with keys of its own."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return None if isinstance(default, BaseModel) else str(default) if default not in ((), {}) else "empty"


def kind_of(part: type[BaseModel]) -> str:
    return str(part.model_fields["kind"].default)


SECTIONS = [
    ("docs/scenarios.md", "Scenario", Scenario),
    ("docs/scenarios.md", "Slo", Slo),
    ("docs/scenarios.md", "Engine", EngineSpec),
    ("docs/scenarios.md", "Sampling", SamplingSpec),
    ("docs/scenarios.md", "Router", RouterThresholds),
    ("docs/scenarios.md", "Disaggregation", Disaggregation),
    ("docs/scenarios.md", "Pool", PoolSpec),
    ("docs/scenarios.md", "Price", Price),
    ("docs/scenarios.md", "Sweep files", SweepSpec),
    ("docs/plan.md", "Request", PlanRequest),
    ("docs/plan.md", "Budget", Budget),
    ("docs/plan.md", "Search", Search),
    *(("docs/scenarios.md", kind_of(part), part) for part in (*SELECTIONS, *REDUCTIONS, *ENCODINGS, *PLANS)),
    *(("docs/serving-tiers.md", kind_of(part), part) for part in (HostTier, NvmeTier, RemoteTier, RecomputeTier)),
    ("docs/workloads.md", "Traces", workload.TraceWorkload),
    ("docs/workloads.md", "Columns", workload.TraceColumns),
    ("docs/workloads.md", "Synthetic loads", workload.SyntheticWorkload),
    ("docs/workloads.md", "Conversations", workload.Conversations),
    ("docs/workloads.md", "Request classes", workload.RequestClass),
    ("docs/serving-adaptive.md", "Adaptive", Adaptive),
    ("docs/serving-adaptive.md", "Level", AdaptiveLevel),
    ("docs/serving-adaptive.md", "Requantize", Requantize),
    ("docs/serving-adaptive.md", "Class levels", ClassLevels),
]


@pytest.mark.parametrize(("document", "heading", "spec"), SECTIONS, ids=lambda value: getattr(value, "__name__", value))
def test_keys_and_defaults_are_documented(document, heading, spec):
    rows = re.findall(r"^\| `(\w+)` \|[^|\n]*\| ([^|\n]*?) \|", section(text_of(document), heading), re.MULTILINE)
    documented = {name: default for name, default in rows if name in spec.model_fields}
    assert set(documented) == set(spec.model_fields)
    for name, field in spec.model_fields.items():
        expected = shown_default(field)
        assert expected is None or documented[name].split()[0] == expected, name


UNIONS = [
    ("docs/workloads.md", "Lengths", workload.Lengths),
    ("docs/workloads.md", "Arrivals", workload.TraceArrivals),
    ("docs/serving-adaptive.md", "Policy", Policy),
]


@pytest.mark.parametrize(("document", "heading", "union"), UNIONS)
def test_kinds_are_documented_with_their_keys(document, heading, union):
    text = section(text_of(document), heading)
    for member in get_args(get_args(union)[0]):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{kind_of(member)}` |")]
        for name in member.model_fields:
            assert name == "kind" or f"`{name}`" in row, name


def test_names_are_documented():
    workloads, scenarios, accuracy = (text_of(f"docs/{name}.md") for name in ("workloads", "scenarios", "accuracy"))
    assert all(f"| `{name}` |" in workloads for name in list_workloads())
    assert all(f"| `{name}` |" in workloads for name in get_args(workload.TraceFormat))
    assert all(f"`{name}`" in scenarios for name in STRATEGIES)
    assert all(f"| `{basis}` |" in accuracy for basis in Basis)


def blocks_of_yaml() -> list[tuple[str, str]]:
    pattern = re.compile(r"^```yaml\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [(name_of(path), block) for path in DOCUMENTS for block in pattern.findall(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("document", "block"), blocks_of_yaml())
def test_yaml_examples_are_valid(document, block):
    data = {"model": "llama-3.1-8b", "device": "h100-sxm", **parse_yaml(block, document)}
    validate(Scenario, data, document, require_units=True)


def test_spellings_of_strategies_parse():
    table = section(text_of("docs/scenarios.md"), "Compression")
    written = re.findall(r"`([^`]+)`", " ".join(re.findall(r"^\| (`[^|]*`) \|", table, re.MULTILINE)))
    assert len(written) > 5
    for name in written:
        parse_compression(name)


# --- the README's numbers -------------------------------------------------------------------------------------------


def readme_rows() -> list[list[str]]:
    table = re.search(r"<!-- table: begin.*? -->\n(.*?)<!-- table: end -->", README, re.DOTALL)
    assert table
    return [line.strip("| ").split(" | ") for line in table[1].splitlines()]


def test_readme_table_has_the_first_command_s_strategies():
    strategies = re.findall(r" -s (\S+)", shell_blocks(README)[0])[0].split(",")
    assert [row[0] for row in readme_rows()[2:]] == strategies
    assert f"with kvsim {__version__};" in README


@pytest.mark.parametrize("row", readme_rows()[2:], ids=lambda row: row[0])
def test_readme_row_is_what_the_command_prints(row):
    scenario = load_scenario(CHECKOUT / "examples" / "azure-h100.yaml", [f"compression={row[0]}"])
    printed = comparison_markdown([Comparison(row[0], simulate(scenario), None)]).splitlines()
    headers, _, values = (line.strip("| ").split(" | ") for line in printed)
    fresh = dict(zip(headers, values, strict=True))
    shown = dict(zip(readme_rows()[0], row, strict=True))
    assert shown == {header: fresh[header] for header in shown}


def test_readme_s_full_pool_example_holds(monkeypatch):
    (arguments,) = [a for d, a in example_commands() if d == "README.md" and "--request-rate" in a]
    words = [*shlex.split(arguments), "--set", "bands=false"]
    monkeypatch.chdir(CHECKOUT)
    result = CliRunner().invoke(build_app(), words)
    assert result.exit_code == 0, result.stderr
    native, fp8, turboquant = (row["report"] for row in json.loads(result.stdout))
    assert native["kv"]["peak_kv_utilization"] > 0.99
    assert native["queue_delay_mean_s"]["value"] > 1
    assert all(report["effects"]["queueing_effect"]["value"] > 100 for report in (fp8, turboquant))
    tpot = [report["latency"]["tpot"]["median_s"]["value"] for report in (fp8, turboquant)]
    assert tpot[0] < tpot[1]


def test_readme_s_reading_of_the_table_holds():
    scenario = load_scenario(CHECKOUT / "examples" / "azure-h100.yaml", ["bands=false"])
    native, fp8, turboquant, quest = (
        row.report for row in compare(scenario, ["native", "fp8", "turboquant_4bit_nc", "quest"])
    )
    assert turboquant.kv.fold > fp8.kv.fold
    assert turboquant.effects.decode_gain.value < 1 < fp8.effects.decode_gain.value
    assert round(native.effects.reference_batch) == 10
    assert max(native.time_split, key=lambda part: part.share).component == "weights"
    assert 0.08 < native.kv.peak_kv_utilization < 0.12
    assert quest.kv.fold < 1
