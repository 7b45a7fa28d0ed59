from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kvsim.calibration.engine_fits import (
    EngineFit,
    apply_engine_fit,
    engine_fit,
    load_engine_fit,
    load_engine_fits,
    used_rows,
)
from kvsim.cost.priors import EDGES, Edge, load_priors
from kvsim.cost.rates import build_rates
from kvsim.device_catalog import load_device
from kvsim.errors import CalibrationError, InvalidSpec
from kvsim.specs.base import Basis

OWN = ("apple-m1", "apple-m2-ultra", "apple-m3-max", "gb10", "snapdragon-8-gen-3", "mi300x", "tpu-v6e", "trainium2")
TAKEN_OVER = ("apple-m4", "apple-m5", "mi325x", "tpu-v7x", "trainium3")


@pytest.mark.parametrize("device", OWN)
def test_devices_with_rows_are_fitted(device: str) -> None:
    fit = engine_fit(device)
    assert fit is not None
    assert fit.basis is Basis.FITTED
    assert fit.note.startswith("engine level")
    assert fit.rows
    assert fit.origins


@pytest.mark.parametrize("device", TAKEN_OVER)
def test_relatives_take_a_fit_over_with_a_wider_band(device: str) -> None:
    fit = engine_fit(device)
    assert fit is not None
    assert fit.basis is Basis.TRANSFERRED
    source = engine_fit(fit.note.removeprefix("engine level, taken over from ").partition(":")[0])
    source = source or engine_fit("apple-m3")
    assert source is not None
    assert fit.layer_overhead_s.high > source.layer_overhead_s.high


def test_devices_with_kernel_tables_have_none() -> None:
    assert engine_fit("h100-sxm") is None
    assert engine_fit("no-such-device") is None


TABLES_OF = {
    "apple": ("apple_silicon_llama7b.csv",),
    "gb10": ("dgx_spark_depth.csv", "dgx_spark_batched_qwen25coder7b_q8.csv"),
    "snapdragon": ("phone_edge_llm.csv",),
    "mi300x": ("mi300x_vllm.csv",),
    "tpu": ("tpu_recipes_inference.csv",),
    "trainium": ("neuron_llama70b_perf_comparison.csv", "neuron_llama405b_perf_comparison.csv"),
}


@pytest.mark.parametrize("name", TABLES_OF)
def test_no_more_than_half_of_the_rows_are_used(shared_data: Path, name: str) -> None:
    lines = {}
    for table in TABLES_OF[name]:
        path = next(shared_data.glob(f"*/{table}"))
        lines[table] = sum(bool(line.strip()) for line in path.read_text(encoding="utf-8-sig").splitlines()) - 1
    used = [(table, row) for table, row in used_rows() if table in lines]
    assert used
    assert all(row <= lines[table] for table, row in used)
    assert 2 * len(used) <= sum(lines.values())


def own_fits() -> list[EngineFit]:
    """One fit per group of devices with rows."""
    by_rows = {fit.rows: fit for fit in load_engine_fits().values() if fit.basis is Basis.FITTED}
    return list(by_rows.values())


def test_rows_that_were_never_used_lie_in_the_band_four_times_of_five() -> None:
    """Bands scale time by one factor, so a row is inside where its error is: by median and p90 of the other rows."""
    rows = inside = 0.0
    for fit in own_fits():
        errors, width = fit.other_rows["decode"], np.log(fit.layer_overhead_s.high / fit.layer_overhead_s.value)
        assert errors.median_ape is not None
        assert errors.p90_ape is not None
        rows += errors.n
        # Between median and p90 the share is taken to grow in proportion.
        reach = np.exp(width) - 1.0
        share = np.interp(reach, [0.0, errors.median_ape, errors.p90_ape], [0.0, 0.5, 0.9])
        inside += errors.n * share
    assert rows >= 60
    assert 0.65 <= inside / rows <= 0.95


@pytest.mark.parametrize("device", ["mi300x", "apple-m2-ultra", "snapdragon-8-gen-3"])
def test_edges_are_ordered(device: str) -> None:
    fit, spec = engine_fit(device), load_device(device).spec
    assert fit is not None
    found = {edge: apply_engine_fit(build_rates(spec, load_priors(), edge), fit, 4) for edge in EDGES}
    central, fast, slow = (found[edge] for edge in (Edge.CENTRAL, Edge.OPTIMISTIC, Edge.PESSIMISTIC))
    for name in ("stream_bytes_per_s", "weight_bytes_per_s", "matmul_efficiency", "attention_flops_per_s"):
        assert getattr(slow, name) <= getattr(central, name) <= getattr(fast, name), name
    assert fast.elementwise_launch_s < central.elementwise_launch_s < slow.elementwise_launch_s
    assert central.weight_bytes_per_s == pytest.approx(spec.bandwidth_bytes_per_s * fit.stream_efficiency.value)
    assert central.elementwise_launch_s * 4 == pytest.approx(fit.layer_overhead_s.value)


class TestFiles:
    def saved(self, folder: Path) -> tuple[EngineFit, Path]:
        fit = engine_fit("mi300x")
        assert fit is not None
        return fit, fit.save(folder)

    def test_a_round_trip_keeps_everything(self, tmp_path: Path) -> None:
        fit, path = self.saved(tmp_path)
        assert load_engine_fit(path) == fit
        assert path.name == f"mi300x-{fit.id}.json"
        assert load_engine_fits(tmp_path) == {"mi300x": fit}

    def test_an_edited_file_is_refused(self, tmp_path: Path) -> None:
        _, path = self.saved(tmp_path)
        document = json.loads(path.read_text())
        document["stream_efficiency"]["value"] = 0.9
        document["stream_efficiency"]["high"] = 0.99
        path.write_text(json.dumps(document))
        with pytest.raises(CalibrationError, match=r"mi300x-.*\.json: content does not match content_sha256"):
            load_engine_fit(path)

    def test_a_schema_from_the_future_is_refused(self, tmp_path: Path) -> None:
        _, path = self.saved(tmp_path)
        document = json.loads(path.read_text()) | {"schema_version": 2}
        path.write_text(json.dumps(document))
        with pytest.raises(CalibrationError, match="schema_version 2 is newer"):
            load_engine_fit(path)

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("stream_efficiency", {"value": 0.5, "low": 0.6, "high": 0.7}, "low <= value <= high"),
            ("stream_efficiency", {"value": 1.5, "low": 0.6, "high": 1.7}, "less than or equal to 1"),
            ("basis", "guessed", "basis: 'guessed' is not allowed"),
        ],
    )
    def test_bad_values_are_named(self, tmp_path: Path, field: str, value: object, message: str) -> None:
        _, path = self.saved(tmp_path)
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
        with pytest.raises(InvalidSpec, match=message):
            load_engine_fit(path)

    def test_what_is_no_object_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "odd.json"
        path.write_text("[1, 2]")
        with pytest.raises(InvalidSpec, match=r"odd\.json: device: required, but missing"):
            load_engine_fit(path)

    def test_two_fits_of_a_device_are_refused(self, tmp_path: Path) -> None:
        fit, _ = self.saved(tmp_path)
        fit.model_copy(update={"note": "engine level: another"}).save(tmp_path)
        with pytest.raises(CalibrationError, match="a second engine-level fit of mi300x"):
            load_engine_fits(tmp_path)
