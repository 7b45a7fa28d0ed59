"""``kvsim risk``: how compressible a cache is, as people and programs read it."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvsim.tensors.ensemble import draw, preset
from kvsim.tensors.files import write_kv

SMALL = "retrieval(num_layers=2,num_tokens=256,num_needles=4):1"


def test_a_person_reads_a_table_and_a_verdict(invoke) -> None:
    answer = invoke("risk", "--ensemble", SMALL, "--error", "0.05")
    assert answer.exit_code == 0, answer.stderr
    assert "retrieval, model seed 1, sequence 0: 2 layers, 2 KV heads, 256 tokens" in answer.stdout
    assert "L1H1" in answer.stdout
    assert "for an output error of 0.05 weighted atoms need" in " ".join(answer.stdout.split())
    assert "At 64 entries per head the first to break" in " ".join(answer.stdout.split())
    assert "* by formula" in answer.stderr


def test_json_holds_every_head_and_the_verdict(invoke) -> None:
    answer = invoke("risk", "--ensemble", SMALL, "--budget", "32", "--json")
    document = json.loads(answer.stdout)
    assert document["budget_atoms"] == 32
    assert len(document["heads"]) == 4
    assert sorted(document["breaking"]) == ["L0H0", "L0H1", "L1H0", "L1H1"]
    assert 0.0 < document["share_compressed"] <= document["share_random"] <= 1.0
    assert document["query_aware"]
    assert len(document["verdict"]) >= 2


def test_csv_has_a_line_per_head(invoke) -> None:
    rows = list(csv.DictReader(io.StringIO(invoke("risk", "--ensemble", SMALL, "--csv").stdout)))
    assert [(row["layer"], row["kv_head"]) for row in rows] == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    assert all(float(row["error_compressed"]) >= 0.0 for row in rows)


def test_a_file_without_prompt_queries_is_measured_query_agnostically(invoke, tmp_path: Path) -> None:
    kv = draw(preset("diffuse", num_layers=1, num_tokens=128), 0)
    mute = replace(kv, layers=tuple(replace(one, prompt_queries=one.prompt_queries[:, :0]) for one in kv.layers))
    write_kv(mute, tmp_path / "mute.safetensors")
    answer = invoke("risk", "--kv", str(tmp_path / "mute.safetensors"), "--error", "0.1")
    assert answer.exit_code == 0, answer.stderr
    assert "no prompt_queries" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "give one of --kv"),
        (("--ensemble", "diffuse", "--kv", "x.safetensors"), "give one of --kv"),
        (("--ensemble", "diffuse", "--error", "0"), "--error 0: a relative error between 0 and 1"),
        (("--ensemble", SMALL, "--budget", "0"), "--budget '0': entries per KV head, such as 256"),
        (("--ensemble", SMALL, "--budget", "120%"), "--budget '120%'"),
        (("--ensemble", SMALL, "--budget", "some"), "--budget 'some'"),
        (("--ensemble", "diffuse", "--json", "--csv"), "exclude each other"),
        (("--kv", "nothing.safetensors"), "no such file"),
        (("--ensemble", "difuse"), "diffuse"),
    ],
)
def test_wrong_input_is_told(invoke, arguments: tuple[str, ...], told: str) -> None:
    answer = invoke("risk", *arguments)
    assert answer.exit_code == 2
    assert told in " ".join(answer.stderr.split())
