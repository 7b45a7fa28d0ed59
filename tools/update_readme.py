"""Run the README's main comparison and write its table and picture into the project.

Run ``python tools/update_readme.py`` after a change that moves a reported number.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from PIL import Image

from kvsim.documents import write_atomic
from kvsim.rendering import comparison_markdown
from kvsim.rendering.gallery import gallery_png
from kvsim.scenario_file import load_scenario
from kvsim.simulate import Comparison, compare

CHECKOUT = Path(__file__).resolve().parents[1]
README = CHECKOUT / "README.md"
PICTURE = CHECKOUT / "docs" / "images" / "report.png"
COLUMNS = (
    "Strategy", "KV fold [x]", "Capacity [tokens]", "TTFT p50 / p99 [ms]", "TPOT p50 / p99 [ms]", "Prefill tax [x]",
    "Decode gain [x]", "1M output [USD]", "Quality",
)  # fmt: skip
TABLE = re.compile(r"(<!-- table: begin.*? -->\n).*?(<!-- table: end -->)", re.DOTALL)
PICTURE_COLORS = 64


def table_columns(markdown: str, columns: tuple[str, ...] = COLUMNS) -> list[str]:
    """Lines of a Markdown comparison with only the named columns, in that order."""
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("|")]
    places = [rows[0].index(column) for column in columns]
    return ["| " + " | ".join(row[place] for place in places) + " |" for row in rows]


def main_command(readme: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Scenario files and strategies of the README's first command."""
    block = re.findall(r"^```sh\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)[0]
    return tuple(re.findall(r"examples/\S+\.yaml", block)), tuple(re.findall(r" -s (\S+)", block)[0].split(","))


def write_picture(groups: list[tuple[str, tuple[Comparison, ...]]]) -> None:
    """Write the gallery with few colours, so that it stays small."""
    with Image.open(io.BytesIO(gallery_png(groups))) as image:
        small = image.convert("RGB").quantize(PICTURE_COLORS, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    write_atomic(PICTURE, buffer.getvalue())


def main() -> None:
    """Update README.md, and the picture unless told otherwise."""
    parser = argparse.ArgumentParser(description="Write the README's table and picture.")
    parser.add_argument("--table-only", action="store_true", help="leave the picture alone")
    arguments = parser.parse_args()
    readme = README.read_text(encoding="utf-8")
    files, strategies = main_command(readme)
    groups = []
    for file in files[:1] if arguments.table_only else files:
        scenario = load_scenario(CHECKOUT / file)
        devices = scenario.num_devices
        title = f"{scenario.model} on {devices} x {scenario.device}, workload {scenario.workload}"
        groups.append((title, compare(scenario, strategies, base_dir=(CHECKOUT / file).parent)))
    table = "\n".join(table_columns(comparison_markdown(groups[0][1])))
    write_atomic(README, TABLE.sub(lambda found: f"{found[1]}{table}\n{found[2]}", readme).encode())
    if not arguments.table_only:
        write_picture(groups)


if __name__ == "__main__":
    main()
