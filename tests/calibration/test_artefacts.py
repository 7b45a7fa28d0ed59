from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_up_artefacts import gemm_artefact, gemm_timings

from kvsim.calibration import staleness
from kvsim.calibration.artefact import load_artefact
from kvsim.calibration.facts import device_facts
from kvsim.device_catalog import load_device
from kvsim.errors import CalibrationError, InvalidSpec

CHECKOUT = Path(__file__).resolve().parents[2]
SHAPE = {"m": np.array([1.0, 64.0, 4096.0]), "n": np.full(3, 4096.0), "k": np.full(3, 4096.0)}


@pytest.fixture
def saved(tmp_path):
    return gemm_artefact().save(tmp_path)


def edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_what_is_read_is_what_was_written(saved):
    read = load_artefact(saved)
    assert read == gemm_artefact()
    assert read.id == gemm_artefact().id
    assert saved.name.endswith(f"-{read.id}.json")
    assert saved.parent.name == "h100-sxm"
    facts = device_facts(load_device("h100-sxm").spec)
    np.testing.assert_array_equal(read.predictor(facts).seconds(SHAPE), gemm_artefact().predictor(facts).seconds(SHAPE))


def test_the_fit_holds_what_the_rows_say():
    facts = device_facts(load_device("h100-sxm").spec)
    predictor = gemm_artefact().predictor(facts)
    frame = gemm_timings().frame
    shape = {name: frame[name].to_numpy().astype(float) for name in "mnk"}
    error = np.abs(predictor.seconds(shape) / frame["seconds"].to_numpy() - 1.0)
    assert np.median(error) < 0.03
    assert predictor.in_domain(SHAPE).tolist() == [True, True, False]
    low, high = predictor.band(SHAPE)
    assert (low <= 1.0).all()
    assert (high >= 1.0).all()


def test_saving_again_changes_nothing(saved):
    before = (saved.read_bytes(), saved.stat().st_mtime_ns)
    assert gemm_artefact().save(saved.parents[1]) == saved
    assert (saved.read_bytes(), saved.stat().st_mtime_ns) == before
    assert len(list(saved.parent.iterdir())) == 1


def test_a_fit_in_another_process_is_the_same_bytes(saved, tmp_path):
    code = (
        "import sys; from pathlib import Path; from made_up_artefacts import gemm_artefact; "
        "gemm_artefact().save(Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT}{os.pathsep}{Path(__file__).parent}", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True, env=environment, cwd=CHECKOUT)
    assert (tmp_path / "again" / "h100-sxm" / saved.name).read_bytes() == saved.read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["parts"][0]["cold"].update(launch_s=1e-9),
        lambda document: document["held_out"]["cold"].update(median_ape=0.0001),
        lambda document: document.update(kernel="vllm/other"),
        lambda document: document.update(rows=document["rows"] + 1),
        lambda document: document.update(content_sha256="0" * 64),
        lambda document: document.pop("content_sha256"),
    ],
)
def test_an_edited_file_is_refused_by_name(saved, change):
    edit(saved, change)
    with pytest.raises(CalibrationError, match="changed after it was written") as caught:
        load_artefact(saved)
    assert str(saved) in str(caught.value)
    assert caught.value.exit_code == 4


def test_a_field_added_later_keeps_old_files_good(saved):
    # Defaults are not stored: what an older kvsim wrote reads as if the new field had its default.
    document = json.loads(saved.read_text())
    assert "kernel_source_sha256" not in document
    assert document["schema_version"] == 1
    assert load_artefact(saved).kernel_source_sha256 is None


def test_a_later_schema_is_refused(saved):
    edit(saved, lambda document: document.update(schema_version=2, something_new=1))
    with pytest.raises(CalibrationError, match="schema_version 2 is newer than this kvsim reads"):
        load_artefact(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.pop("law"), "law: required"),
        (lambda document: document.update(basis="guessed"), "basis"),
        (lambda document: document.update(parts=[]), "parts"),
        (lambda document: document["parts"][0]["correction"].update(values="AAAA"), "numbers of 16 bits"),
        (lambda document: document.update(rows=0), "rows"),
    ],
)
def test_a_broken_file_names_file_and_field(saved, change, message):
    edit(saved, change)
    with pytest.raises(InvalidSpec, match=message) as caught:
        load_artefact(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "not json", '{"schema_version": "x"}'])
def test_what_is_no_artefact_is_an_error_of_ours(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises((InvalidSpec, CalibrationError), match=r"a\.json"):
        load_artefact(path)


def test_no_time_or_path_of_this_machine_is_stored(saved, tmp_path):
    text = saved.read_text()
    assert str(Path.home()) not in text
    assert str(tmp_path) not in text
    assert {"kvsim", "numpy", "scipy"} <= set(json.loads(text)["software"])
    assert json.loads(text)["origins"][0]["licence"] == "CC0-1.0"


def test_an_own_kernel_is_stale_once_its_source_changes(monkeypatch):
    own = gemm_artefact(kernel="kvsim/best", version="aaaaaaaaaaaa")
    assert own.kernel_source_sha256 == "aaaaaaaaaaaa"
    monkeypatch.setattr(staleness, "current_sources", lambda: frozenset({"a" * 64, "c" * 64}))
    assert not own.is_stale
    monkeypatch.setattr(staleness, "current_sources", lambda: frozenset({"b" * 64}))
    assert own.is_stale
    assert not gemm_artefact().is_stale
    monkeypatch.setattr(staleness, "current_sources", frozenset)
    assert not own.is_stale
