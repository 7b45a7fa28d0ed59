"""``kvsim quality run``: three kinds of risk in three groups, for people and for programs."""

from __future__ import annotations

import csv
import io
import json

import pytest

from kvsim.tensors.ensemble import draw, parse_ensemble, preset
from kvsim.tensors.files import write_kv

SMALL = "llama-like(num_layers=1,num_tokens=128,num_needles=2,num_queries=4)"


def test_a_table_has_its_groups_apart(invoke):
    result = invoke("quality", "run", "--ensemble", SMALL, "-s", "native")
    assert result.exit_code == 0, result.stderr
    groups, names, _, row = [line for line in result.stdout.splitlines() if line.strip()][1:5]
    assert groups.split() == ["theory"] * 4 + ["measured"] * 6 + ["published"]
    assert names.split()[:2] == ["strategy", "bits/element"]
    assert row.split()[:2] == ["native", "16.000"]
    assert row.split()[-1] == "baseline"
    assert "three kinds of risk" in result.stderr


def test_layers_that_a_format_leaves_alone_are_told(invoke, tmp_path):
    four, five = (SMALL.replace("num_layers=1", f"num_layers={count}") for count in (4, 5))
    drawn = invoke("quality", "run", "--ensemble", four, "-s", "turboquant_4bit_nc,turboquant_3bit_nc")
    assert drawn.exit_code == 0, drawn.stderr
    assert "turboquant_4bit_nc, turboquant_3bit_nc: the first and last 2 layers of a model stay native" in drawn.stderr
    spec, seed = parse_ensemble(five)
    path = tmp_path / "five.safetensors"
    write_kv(draw(spec, seed), path)
    assert "4 of 5 layers stay native" in invoke("quality", "run", "--kv", path, "-s", "turboquant_4bit_nc").stderr


def test_json_keeps_the_layers_apart(invoke):
    result = invoke("quality", "run", "--ensemble", f"{SMALL}:3", "-s", "native", "--heads", "--json")
    document = json.loads(result.stdout)
    assert document["source"] == "llama-like, model seed 3, sequence 0"
    (row,) = document["strategies"]
    assert row["bits_per_element"] == 16.0
    assert set(row["theory"]) == {"output_error", "logit_error", "eviction_bound", "cautions", "heads"}
    assert row["measured"]["top1_agreement"] == 1.0
    assert len(row["measured"]["heads"]) == len(row["theory"]["heads"]) == 8
    assert row["published"]["status"] == "baseline"
    assert row["model"] is None


def test_csv_has_a_line_per_strategy_or_per_head(invoke):
    plain = list(
        csv.DictReader(io.StringIO(invoke("quality", "run", "--ensemble", SMALL, "-s", "native", "--csv").stdout))
    )
    assert [line["strategy"] for line in plain] == ["native"]
    assert plain[0]["theory_output_error"] == plain[0]["measured_output_error"] == "0.0"
    text = invoke("quality", "run", "--ensemble", SMALL, "-s", "native", "--csv", "--heads").stdout
    heads = list(csv.DictReader(io.StringIO(text)))
    assert len(heads) == 8
    assert heads[0]["measured_lost_mass"] == "0.0"


def test_tensors_from_a_file(invoke, tmp_path):
    pytest.importorskip("safetensors")

    path = tmp_path / "kv.safetensors"
    write_kv(draw(preset("diffuse", num_layers=1, num_tokens=64, num_prompt_queries=8), 0), path)
    result = invoke("quality", "run", "--kv", path, "-s", "native", "--heads")
    assert result.exit_code == 0, result.stderr
    assert "diffuse" not in result.stdout
    assert "query head" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give one of --kv"),
        (("--kv", "x.safetensors", "--ensemble", "diffuse"), "give one of --kv"),
        (("--kv", "none.safetensors"), "none.safetensors: no such file"),
        (("--ensemble", "lama"), "unknown ensemble 'lama'"),
        (("--ensemble", "diffuse", "--calibrate", "x.safetensors"), "--calibrate goes with --kv and --model"),
        (("--ensemble", "diffuse", "--tokens", "64"), "--prompt-queries go with --model"),
        (("--ensemble", "diffuse", "--json", "--csv"), "exclude each other"),
        (("--ensemble", "diffuse", "-s", "natve"), "unknown strategy 'natve'"),
    ],
)
def test_wrong_input_is_named(invoke, options, message):
    result = invoke("quality", "run", *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_methods_that_calibrate_need_other_sequences(invoke, tmp_path):
    pytest.importorskip("safetensors")

    spec = preset("llama-like", num_layers=2, num_tokens=128, num_needles=2, num_queries=4)
    paths = [tmp_path / f"{sequence}.safetensors" for sequence in range(2)]
    for sequence, path in enumerate(paths):
        write_kv(draw(spec, 0, sequence=sequence), path)
    run = ("quality", "run", "--kv", paths[0], "-s", "eigen_attention")
    alone = invoke(*run)
    assert alone.exit_code == 2
    assert "it calibrates on other sequences of the model, and none are given" in alone.stderr
    calibrated = invoke(*run, "--calibrate", paths[1])
    assert calibrated.exit_code == 0, calibrated.stderr
    other = tmp_path / "other.safetensors"
    write_kv(draw(preset("diffuse", num_layers=1, num_tokens=64), 0), other)
    wrong = invoke(*run, "--calibrate", other)
    assert wrong.exit_code == 2
    assert "other.safetensors: layers, heads or dimensions" in wrong.stderr


def test_merged_entries_are_said_to_be_beyond_formulas_of_noise(invoke):
    ensemble = "diffuse(num_layers=1,num_tokens=128)"
    result = invoke("quality", "run", "--ensemble", ensemble, "-s", "weighted_atoms,snapkv:0.4,int4_per_token_head")
    assert result.exit_code == 0, result.stderr
    told = [line for line in result.stderr.splitlines() if "entries are merged" in line]
    assert len(told) == 1
    assert "weighted_atoms:" in told[0]
