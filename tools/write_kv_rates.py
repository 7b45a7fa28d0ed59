"""Write calibration/priors/kv_rates.yaml and the table of docs/methods/entropy-coding.md: what codes really take.

Every encoding that makes codes runs on drawn caches (kvsim/tensors/ensemble), every coder codes what comes out, and
whole codecs run as they are. Run ``OMP_NUM_THREADS=1 python tools/write_kv_rates.py`` after an encoding, a coder or an
ensemble has changed; it takes minutes. Named codecs (``write_kv_rates.py kvtc kvtc:16``) are measured alone, and their
lines replaced.
"""

from __future__ import annotations

import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from kvsim.compression import CODINGS, STRATEGIES, Compression, parse_compression
from kvsim.compression.codec import StoredLayer, Symbols, fixed_width_bits
from kvsim.compression.coding.base import Coding
from kvsim.compression.spelling import spell_part
from kvsim.documents import write_atomic
from kvsim.errors import NotRunnable
from kvsim.numerics.entropy import Context, empirical_entropy
from kvsim.quality.store import fit_strategy, store_cache
from kvsim.tensors import KvTensors
from kvsim.tensors.ensemble import PRESETS, draw, preset

CHECKOUT = Path(__file__).resolve().parents[1]
RATES = CHECKOUT / "calibration" / "priors" / "kv_rates.yaml"
PAGE = CHECKOUT / "docs" / "methods" / "entropy-coding.md"
TABLES = re.compile(r"(<!-- rates: begin.*? -->\n).*?(<!-- rates: end -->)", re.DOTALL)
SEEDS = (0, 1)
NUM_SAMPLES = 3
NUM_WORKERS = 3
CONTEXTS: tuple[Context, ...] = ("tensor", "head", "channel")
SOURCE = (
    "measured on synthetic caches of 1,024 tokens, 2 KV heads of 128, 4 layers (codes: the first of them) by "
    "tools/write_kv_rates.py; of no model"
)


@dataclass
class Measured:
    """Bits of one thing over caches: its size in each, and the number of values."""

    bits: list[float] = field(default_factory=list)
    plain_bits: list[float] = field(default_factory=list)
    values: list[int] = field(default_factory=list)

    def add(self, bits: float, plain_bits: float, values: int) -> None:
        """Take in one cache."""
        self.bits.append(bits)
        self.plain_bits.append(plain_bits)
        self.values.append(values)

    @property
    def shares(self) -> list[float]:
        """Size over that without coding, cache by cache."""
        return [bits / plain for bits, plain in zip(self.bits, self.plain_bits, strict=True)]

    @property
    def bits_per_value(self) -> float:
        """Mean over caches of equal size."""
        return sum(self.bits) / sum(self.values)

    def row(self, steps: int) -> str:
        """The YAML of a share: mean, and the span rounded outward to one in ``steps``."""
        shares = self.shares
        low, high = math.floor(steps * min(shares)) / steps, math.ceil(steps * max(shares)) / steps
        return f"{{value: {sum(shares) / len(shares):.4f}, low: {low:g}, high: {high:g}}}"


@lru_cache(maxsize=1)
def caches() -> tuple[tuple[KvTensors, tuple[KvTensors, ...]], ...]:
    """Every cache to measure, with other sequences of the same model."""
    found = []
    for name in PRESETS:
        spec = preset(name, num_queries=8, num_prompt_queries=8)
        for seed in SEEDS:
            samples = tuple(draw(spec, seed, sequence=one) for one in range(1, NUM_SAMPLES + 1))
            found.append((draw(spec, seed), samples))
    return tuple(found)


def codings() -> tuple[Coding, ...]:
    """Every coding, with each of its models."""
    plain = tuple(part() for part in CODINGS if part().kind != "fixed_width")
    return (*plain, parse_coding("arithmetic(model=channel)"))


def parse_coding(text: str) -> Coding:
    """Give a coding with parameters."""
    name, _, rest = text.partition("(")
    part = next(part for part in CODINGS if name in part.names)
    return part.model_validate(dict(item.split("=") for item in rest.rstrip(")").split(",")))


def encodings() -> Iterator[str]:
    """Names that are an encoding and nothing else; pairs may lean on rates that are yet to be measured."""
    for name in STRATEGIES:
        if "+" in name:
            continue
        one = parse_compression(name)
        if one == Compression(encoding=one.encoding) and not one.encoding.is_native:
            yield name


def encode(name: str) -> list[tuple[KvTensors, tuple[StoredLayer, ...]]] | None:
    """Every cache as an encoding stores it, or None where its algorithm does not run."""
    encoding = parse_compression(name).encoding
    try:
        return [(kv, encoding.codec().fit(samples).store(kv)) for kv, samples in caches()]
    except NotRunnable:
        return None


def measure_codes(layers: Sequence[StoredLayer], found: dict[str, Measured]) -> None:
    """Code one cache's codes with every coder, and take their entropies."""
    symbols = [one for layer in layers for one in layer.symbols]
    plain, values = sum(map(fixed_width_bits, symbols)), sum(one.codes.size for one in symbols)
    for context in CONTEXTS:
        found[f"entropy {context}"].add(sum(_entropy_bits(one, context) for one in symbols), plain, values)
    for coding in codings():
        coder = coding.coder()
        found[spell_part(coding)].add(sum(coder.coded_bits(one) for one in symbols), plain, values)
    found["fixed width"].add(plain, plain, values)


def _entropy_bits(symbols: Symbols, context: Context) -> float:
    return empirical_entropy(symbols.codes, symbols.levels, context) * symbols.codes.size


def measure_codec(name: str) -> Measured:
    """Whole codec on every cache; tokens that stay native are left out."""
    measured, compression = Measured(), parse_compression(name)
    for kv, samples in caches():
        stored = store_cache(fit_strategy(compression, samples), kv)
        exempt = compression.encoding.native_tokens
        values = [(layer.keys.size + layer.values.size) // layer.num_tokens for layer in kv.layers]
        native = sum(values) * exempt * kv.native_bits
        coded = sum(one * (layer.num_tokens - exempt) for one, layer in zip(values, kv.layers, strict=True))
        measured.add(stored.total_bits - native, coded * kv.native_bits, coded)
    return measured


def measure(name: str) -> tuple[str, dict[str, Measured] | Measured | None]:
    """Everything about one encoding, or None where it has no codes."""
    if parse_compression(name).encoding.is_storage_only:
        return name, measure_codec(name)
    stored = encode(name)
    if stored is None or not stored[0][1][0].symbols:
        return name, None
    found: dict[str, Measured] = defaultdict(Measured)
    for _, layers in stored:
        measure_codes(layers[:1], found)
    return name, dict(found)


def main() -> None:
    """Measure everything and write both files."""
    codes: dict[str, dict[str, Measured]] = {}
    codecs: dict[str, Measured] = {}
    with ProcessPoolExecutor(max_workers=NUM_WORKERS) as pool:
        for name, found in pool.map(measure, encodings()):
            print(name, "measured" if found else "has no codes", flush=True)
            if isinstance(found, Measured):
                codecs[name] = found
            elif found:
                codes[name] = found
    write_atomic(RATES, rates_text(codes, codecs).encode())
    page = PAGE.read_text(encoding="utf-8")
    table = f"{code_table(codes)}\n{codec_table(codecs)}"
    write_atomic(PAGE, TABLES.sub(lambda match: f"{match[1]}\n{table}\n{match[2]}", page).encode())


def remeasure(names: Sequence[str]) -> None:
    """Measure some codecs again and replace their lines in both files."""
    rates, page = (path.read_text(encoding="utf-8") for path in (RATES, PAGE))
    for name in names:
        measured = measure_codec(name)
        rates = replace_line(rates, f'  "{name}": ', codec_line(name, measured))
        page = replace_line(page, f"| `{name}` | ", codec_row(name, measured), after="| Codec |")
    write_atomic(RATES, rates.encode())
    write_atomic(PAGE, page.encode())


def replace_line(text: str, start: str, new: str, *, after: str = "codecs:") -> str:
    """Replace the one line that starts so, in what follows ``after``; raise ValueError where there is none."""
    head, mark, tail = text.partition(after)
    lines = tail.split("\n")
    found = [index for index, line in enumerate(lines) if line.startswith(start)]
    if not found:
        msg = f"no line starts with {start!r} after {after!r}: measure everything once"
        raise ValueError(msg)
    lines[found[0]] = new
    return head + mark + "\n".join(lines)


def rates_text(codes: dict[str, dict[str, Measured]], codecs: dict[str, Measured]) -> str:
    """The YAML file."""
    lines = [
        "# Generated by tools/write_kv_rates.py: do not edit.",
        "#",
        f"# What codes and 16-bit numbers take once they are coded, on ensembles {', '.join(PRESETS)}, seeds "
        f"{' and '.join(map(str, SEEDS))}.",
        "# value is the mean over them, low and high are the least and the most, rounded outward.",
        "schema_version: 1",
        "name: kv-rates-ensembles",
        f'source: "{SOURCE}"',
        "",
        "codings:      # encoding, coding: coded bits / bits of fixed width, tables included, metadata left out",
    ]
    for name, found in codes.items():
        lines.append(f"  {name}:")
        lines += [f'    "{spell_part(one)}": {found[spell_part(one)].row(100)}' for one in codings()]
    lines += ["", "codecs:       # bits / bits of the 16-bit cache, native tokens left out"]
    lines += [codec_line(name, measured) for name, measured in codecs.items()]
    return "\n".join(lines) + "\n"


def codec_line(name: str, measured: Measured) -> str:
    """A codec's line of the YAML file."""
    return f'  "{name}": {measured.row(1000)}'


def code_table(codes: dict[str, dict[str, Measured]]) -> str:
    """Bits per value of every encoding under every coder, entropies beside."""
    heads = ["fixed width", *(f"entropy {one}" for one in CONTEXTS), *(spell_part(one) for one in codings())]
    titles = ["width", "H", "H per head", "H per channel", *(f"`{spell_part(one)}`" for one in codings())]
    lines = [f"| Encoding | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    for name, found in codes.items():
        cells = (f"{found[one].bits_per_value:.2f}" for one in heads)
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def codec_table(codecs: dict[str, Measured]) -> str:
    """Bits per value of whole codecs, and the span over caches."""
    lines = ["| Codec | bits per value | span over caches | times smaller than 16 bits |", "|---|---|---|---|"]
    lines += [codec_row(name, one) for name, one in codecs.items()]
    return "\n".join(lines) + "\n"


def codec_row(name: str, measured: Measured) -> str:
    """A codec's row of the page's table."""
    span = f"{16 * min(measured.shares):.2f} to {16 * max(measured.shares):.2f}"
    return f"| `{name}` | {measured.bits_per_value:.2f} | {span} | {16 / measured.bits_per_value:.2f} |"


if __name__ == "__main__":
    if sys.argv[1:]:
        remeasure(sys.argv[1:])
    else:
        main()
