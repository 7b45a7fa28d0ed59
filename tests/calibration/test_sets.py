from __future__ import annotations

import json
import re

import numpy as np
import pytest
from made_up_artefacts import gemm_artefact, write_set

from kvsim.calibration import staleness
from kvsim.calibration.choice import default_ids, version_order
from kvsim.calibration.facts import device_facts
from kvsim.calibration.sets import list_sets, load_set
from kvsim.catalog import resolve_calibration
from kvsim.data_files import data_dir
from kvsim.device_catalog import load_device
from kvsim.errors import CalibrationError, InvalidSpec, UnknownName
from kvsim.scenario import Scenario

H100 = load_device("h100-sxm").spec


def scenario(**more):
    return Scenario.model_validate({"model": "llama-3.1-8b", "device": "h100-sxm", "workload": "chat", **more})


def test_auto_takes_the_default_and_a_name_takes_that_kernel(tmp_path):
    vllm, sglang = gemm_artefact(), gemm_artefact(kernel="sglang/linear", version="0.5")
    found = load_set(str(write_set(tmp_path, vllm, sglang, defaults=(sglang,))))
    assert found.find("h100-sxm", "gemm", dtype="bf16") == sglang
    assert found.find("h100-sxm", "gemm", kernel="vllm/linear", dtype="bf16") == vllm
    assert found.find("h100-sxm", "gemm", kernel="vllm/linear@1.0", dtype="bf16") == vllm
    assert found.find("h100-sxm", "gemm", kernel="vllm/linear@2.0", dtype="bf16") is None
    assert found.find("h100-sxm", "gemm", dtype="fp8") is None
    assert found.find("l40s", "gemm", dtype="bf16") is None
    assert set(found.kernels("h100-sxm", "gemm")) == {"vllm/linear", "sglang/linear"}
    assert found.covers("h100-sxm")
    assert not found.covers("l40s")
    assert {one.id for one in found.entries} == {vllm.id, sglang.id}


def test_a_missing_artefact_is_named(tmp_path):
    path = write_set(tmp_path, gemm_artefact(), defaults=(gemm_artefact(),))
    (tmp_path / "fitted" / "h100-sxm" / gemm_artefact().file_name).unlink()
    with pytest.raises(CalibrationError, match=re.escape(gemm_artefact().file_name)) as caught:
        load_set(str(path)).find("h100-sxm", "gemm", dtype="bf16")
    assert str(path) in str(caught.value)


def test_an_edited_artefact_is_refused(tmp_path):
    path = write_set(tmp_path, gemm_artefact(), defaults=(gemm_artefact(),))
    file = tmp_path / "fitted" / "h100-sxm" / gemm_artefact().file_name
    document = json.loads(file.read_text())
    document["rows"] += 1
    file.write_text(json.dumps(document))
    with pytest.raises(CalibrationError, match="changed after it was written"):
        load_set(str(path)).find("h100-sxm", "gemm", dtype="bf16")


def test_another_artefact_under_the_pinned_name_is_refused(tmp_path):
    pinned, other = gemm_artefact(), gemm_artefact(slowness=2.0)
    path = write_set(tmp_path, pinned, defaults=(pinned,))
    folder = tmp_path / "fitted" / "h100-sxm"
    other.save(tmp_path / "fitted").replace(folder / pinned.file_name)
    with pytest.raises(CalibrationError, match=f"as {pinned.id}, but its content is {other.id}"):
        load_set(str(path)).find("h100-sxm", "gemm", dtype="bf16")


def test_a_pin_that_says_another_key_is_refused(tmp_path):
    path = write_set(tmp_path, gemm_artefact(), defaults=(gemm_artefact(),))
    file = tmp_path / "fitted" / "h100-sxm" / gemm_artefact().file_name
    file.rename(file.with_name(file.name.replace("-bf16-", "-fp8-")))
    path.write_text(path.read_text().replace('dtype: "bf16"', 'dtype: "fp8"', 1))
    with pytest.raises(CalibrationError, match="but it is h100-sxm gemm vllm/linear"):
        load_set(str(path)).find("h100-sxm", "gemm", dtype="fp8")


def test_one_key_twice_is_refused(tmp_path):
    path = write_set(tmp_path, gemm_artefact(), gemm_artefact(slowness=2.0))
    with pytest.raises(CalibrationError, match="pinned 2 times"):
        load_set(str(path))


def test_two_defaults_are_refused(tmp_path):
    both = (gemm_artefact(), gemm_artefact(kernel="sglang/linear"))
    path = write_set(tmp_path, *both, defaults=both)
    with pytest.raises(CalibrationError, match="two defaults, sglang/linear and vllm/linear"):
        load_set(str(path))


def test_a_later_schema_is_refused(tmp_path):
    path = write_set(tmp_path, gemm_artefact())
    path.write_text(path.read_text().replace("schema_version: 1", "schema_version: 9"))
    with pytest.raises(CalibrationError, match="schema_version 9 is newer"):
        load_set(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema_version: 1\nname: x\nartefacts: []\n", "artefacts"),
        ("schema_version: 1\nname: x\n", "artefacts"),
        (
            "schema_version: 1\nname: x\nartefacts:\n"
            '- {id: "0123456789ab", device: "../../x", operation: "a", kernel: "b", version: "1", dtype: "c"}\n',
            r"artefacts\.0\.device",
        ),
        ("- 1\n", "must be a mapping"),
        ("artefacts: [", "not valid YAML"),
        ('schema_version: 1\nname: x\nartefacts:\n- {id: "short", device: "a", operation: "b"}\n', r"artefacts\.0\.id"),
    ],
)
def test_a_broken_set_names_file_and_field(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InvalidSpec, match=message) as caught:
        load_set(str(path))
    assert str(path) in str(caught.value)


def test_a_set_is_read_anew_when_its_file_changes(tmp_path):
    path = write_set(tmp_path, gemm_artefact())
    assert load_set(str(path)).find("h100-sxm", "gemm", dtype="bf16") is None
    write_set(tmp_path, gemm_artefact(), defaults=(gemm_artefact(),))
    assert load_set(str(path)).find("h100-sxm", "gemm", dtype="bf16") == gemm_artefact()


def test_unknown_names_get_suggestions(tmp_path):
    with pytest.raises(UnknownName, match="did you mean 'default'"):
        load_set("defualt")
    with pytest.raises(UnknownName, match="did you mean 'datasheet'") as caught:
        resolve_calibration(scenario(calibration="datashet"), H100)
    assert str(caught.value).startswith("calibration:")
    path = write_set(tmp_path, gemm_artefact())
    with pytest.raises(UnknownName, match=r"engine\.attention_kernel: .*'auto'"):
        resolve_calibration(scenario(calibration=str(path), engine={"attention_kernel": "autoo"}), H100)


def test_a_missing_set_file_is_named(tmp_path):
    with pytest.raises(InvalidSpec, match=r"nowhere\.yaml"):
        load_set("nowhere.yaml", base_dir=tmp_path)


def test_a_scenario_resolves_to_its_set(tmp_path):
    path = write_set(tmp_path, gemm_artefact())
    assert resolve_calibration(scenario(calibration="datasheet"), H100) is None
    found = resolve_calibration(scenario(calibration="sets/mine.yaml"), H100, base_dir=tmp_path)
    assert found is not None
    assert found.path == path
    assert resolve_calibration(scenario(calibration=str(path)), load_device("l40s").spec) is None


def test_a_kernel_of_the_set_may_be_named():
    shipped = load_set()
    kernel = shipped.kernels("h100-sxm", "decode_attention")[0]
    assert resolve_calibration(scenario(engine={"attention_kernel": kernel}), H100) is shipped


def test_stale_kernels_are_told(tmp_path, monkeypatch):
    own = gemm_artefact(kernel="kvsim/best", version="aaaaaaaaaaaa")
    found = load_set(str(write_set(tmp_path, own, gemm_artefact())))
    monkeypatch.setattr(staleness, "current_sources", lambda: frozenset({"b" * 64}))
    (note,) = found.stale_notes("h100-sxm")
    assert own.id in note
    assert "stale" in note


def test_versions_are_ordered_as_their_makers_mean_them():
    versions = [
        "unstated", "0.5.6", "0.5.6.post2", "0.5.10", "0.20.1.dev3", "0.20.1", "1.0", "1.0.1", "1.3.0rc5", "1.3.0rc20",
        "1.3.0",
    ]  # fmt: skip
    assert sorted(set(versions), key=version_order) == versions


def test_auto_prefers_production_kernels_then_versions():
    own = gemm_artefact(kernel="kvsim/best", version="aaaaaaaaaaaa")
    trtllm, sglang = gemm_artefact(kernel="trtllm/torch_flow"), gemm_artefact(kernel="sglang/linear")
    old, new = gemm_artefact(version="0.9"), gemm_artefact(kernel="vllm/other", version="0.10")
    assert default_ids([own]) == {own.id}
    assert default_ids([own, trtllm]) == {trtllm.id}
    assert default_ids([sglang, own, trtllm]) == {sglang.id}
    assert default_ids([sglang, old, new]) == {new.id}
    fp8 = gemm_artefact(dtype="fp8")
    assert default_ids([new, fp8]) == {new.id, fp8.id}


def test_the_shipped_set_is_whole():
    assert "default" in list_sets()
    shipped = load_set()
    devices = {one.device for one in shipped.entries}
    assert {"a100-sxm-80gb", "h100-sxm", "b200-sxm", "l40s", "arc-pro-b60", "rtx-4090", "h20", "h800"} <= devices
    files = {
        path.relative_to(data_dir("calibration/fitted")) for path in data_dir("calibration/fitted").rglob("*.json")
    }
    assert files >= {pin.file for pin in shipped.pins}
    assert all(one.origins and all(origin.licence for origin in one.origins) for one in shipped.entries)
    size_bytes = sum(path.stat().st_size for path in data_dir("calibration/fitted").rglob("*"))
    assert size_bytes < 6e6


def test_laws_and_datasheets_are_those_that_the_shipped_fits_were_made_with():
    for one in load_set().entries:
        if one.probe:
            shape = {name: np.array([value]) for name, value in one.probe.items() if name != "seconds"}
            predictor = one.predictor(device_facts(load_device(one.device).spec))
            assert predictor.seconds(shape)[0] == pytest.approx(one.probe["seconds"], rel=1e-5), one.file_name
