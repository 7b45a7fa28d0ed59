from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvsim.calibration.artefact import Artefact, Band, HeldOut, Part, RowOrigin
from kvsim.calibration.compiled import clocks_per_unit, compiled_artefact, compiled_predictor
from kvsim.calibration.facts import device_facts
from kvsim.calibration.laws import law_for
from kvsim.calibration.pooled import DeviceRows, fit_pooled
from kvsim.calibration.sets import load_set
from kvsim.calibration.shapes import BOUNDS, binding_terms, sample_shapes
from kvsim.calibration.timings import SHAPE_COLUMNS
from kvsim.calibration.transfer import find_donors, kernel_family, transferred, transferred_artefact
from kvsim.calibration.transfer_errors import band_of, load_errors, transfer_bands
from kvsim.device_catalog import load_device
from kvsim.specs.base import Basis

LAW = law_for("decode_attention")
TRUTH = {
    "launch_s": 1e-5,
    "per_sequence_s": 2e-8,
    "stream_efficiency": 0.9,
    "matmul_efficiency": 0.25,
    "unpack_rate": 1.5,
    "depth_s": 1e-8,
    "item_tokens": 25.0,
    "sharpness": 4.0,
}
DOMAIN = {
    "batch": (1.0, 256.0),
    "context_tokens": (128.0, 65536.0),
    "num_heads": (8.0, 64.0),
    "num_kv_heads": (1.0, 8.0),
    "head_dim": (128.0, 128.0),
    "window_tokens": (0.0, 0.0),
}
ORIGIN = RowOrigin(path="made_up.csv", sha256="0" * 64, origin="test", licence="none")


def artefact(device: str, kernel: str = "vllm/fa2", kv_dtype: str = "bf16", **parameters: float) -> Artefact:
    return Artefact(
        device=device,
        operation="decode_attention",
        kernel=kernel,
        version="1.0",
        dtype="bf16",
        kv_dtype=kv_dtype,
        basis=Basis.FITTED,
        law=LAW.name,
        parts=(Part(selector={"head_dim": 128}, cold=TRUTH | parameters),),
        domain=DOMAIN,
        rows=1000,
        held_out={"cold": HeldOut(n=100, median_ape=0.02, p90_ape=0.05, bias=0.0)},
        bands={"cold": Band(coverage=0.8, log_low=-0.05, log_high=0.05)},
        origins=(ORIGIN,),
        software={"kvsim": "test"},
    )


DONORS = tuple(artefact(name) for name in ("a100-sxm-80gb", "h100-sxm", "l40s", "h20"))
TARGET = load_device("h200-sxm").spec


def shapes(batch: list[float], context: list[float]) -> dict[str, np.ndarray]:
    ones = np.ones(len(batch))
    return {
        "batch": np.asarray(batch),
        "context_tokens": np.asarray(context),
        "num_heads": 32 * ones,
        "num_kv_heads": 8 * ones,
        "head_dim": 128 * ones,
        "window_tokens": 0 * ones,
    }


def entry(clocks: float = 9.0, **changes: object) -> dict[str, object]:
    count = {"clocks": {"issue": clocks, "alu": clocks / 2}, "loops_counted_once": 0, "unpriced": []}
    document: dict[str, object] = {
        "operation": "decode_attention",
        "cost_unit": "token_kv_head",
        "compile_case": "llama-3-8b",
        "kv_format": "int8",
        "form": "best",
        "source_sha256": "ab" * 32,
        "targets": {"sm_90": {"configs": [{"count": count}]}, "sm_80": {"unsupported": "no"}},
    }
    return document | changes


class TestDonors:
    def test_the_target_and_own_kernels_and_other_formats_are_left_out(self) -> None:
        moved = transferred_artefact(DONORS, load_device("l4").spec, "decode_attention", "bf16", "bf16")
        assert moved is not None
        others = (
            artefact("h200-sxm"),
            artefact("b200-sxm", "kvsim/best"),
            artefact("b200-sxm", kv_dtype="fp8"),
            moved,
        )
        found = find_donors([*DONORS, *others], TARGET, "decode_attention", "bf16", "bf16")
        assert [donor.artefact.device for donor in found] == [one.device for one in DONORS]
        assert sum(donor.weight for donor in found) == pytest.approx(1.0)

    def test_the_same_architecture_and_family_weigh_more(self) -> None:
        pool = [artefact("a100-sxm-80gb"), artefact("h100-sxm"), artefact("l40s", "sglang/fa3"), artefact("l40s")]
        plain = {d.artefact.device: d.weight for d in find_donors(pool, TARGET, "decode_attention", "bf16", "bf16")}
        assert plain["h100-sxm"] == pytest.approx(2 * plain["a100-sxm-80gb"])
        named = find_donors(pool, TARGET, "decode_attention", "bf16", "bf16", "vllm/flash_attn_fa3@0.24.0")
        l40s = next(donor for donor in named if donor.artefact.device == "l40s")
        assert l40s.artefact.kernel == "sglang/fa3"
        assert l40s.weight == max(donor.weight for donor in named)

    @pytest.mark.parametrize(
        ("kernel", "family"),
        [("sglang/fa3", "fa3"), ("vllm/flash_attn_fa3", "fa3"), ("trtllm/torch_flow", "trtllm"), ("x/odd", "odd")],
    )
    def test_families(self, kernel: str, family: str) -> None:
        assert kernel_family(kernel) == family


class TestPooledFit:
    def test_recovers_parameters_that_bind_somewhere(self) -> None:
        rows = []
        for donor in DONORS:
            facts = device_facts(load_device(donor.device).spec)
            shape, seconds = sample_shapes(donor.predictor(facts), {"head_dim": 128}, 200)
            key = {"dtype": "bf16", "kv_dtype": "bf16"}
            rows.append(DeviceRows(shape, seconds, facts, key, 1 / len(DONORS)))
        found = fit_pooled(LAW, rows)
        for name in ("launch_s", "stream_efficiency", "matmul_efficiency"):
            assert found[name] == pytest.approx(TRUTH[name], rel=0.1), name
        assert fit_pooled(LAW, rows) == found

    def test_known_parameters_stay(self) -> None:
        facts = device_facts(TARGET)
        shape = shapes([1.0] * 30, list(np.geomspace(128, 65536, 30)))
        rows = [DeviceRows(shape, np.full(30, 1e-4), facts, {"dtype": "bf16", "kv_dtype": "bf16"}, 1.0)]
        assert fit_pooled(LAW, rows, {"launch_s": 7e-6})["launch_s"] == 7e-6


class TestTransferred:
    def test_devices_that_follow_one_law_transfer_nearly_exactly(self) -> None:
        predictor = transferred(DONORS, TARGET, "decode_attention", "bf16", "bf16")
        assert predictor is not None
        shape, _ = sample_shapes(predictor, {"head_dim": 128}, 200)
        expected = artefact("h200-sxm").predictor(device_facts(TARGET)).seconds(shape)
        assert np.median(np.abs(predictor.seconds(shape) / expected - 1.0)) < 0.03
        assert predictor.in_domain(shape).all()
        assert predictor.artefact.basis is Basis.TRANSFERRED
        assert predictor.artefact.device == "h200-sxm"
        assert predictor.artefact.origins == (ORIGIN,)

    def test_more_work_never_takes_less_time(self) -> None:
        predictor = transferred(DONORS, TARGET, "decode_attention", "bf16", "bf16")
        assert predictor is not None
        contexts = list(np.geomspace(16, 131072, 60))
        for batch in (1.0, 7.0, 512.0):
            seconds = predictor.seconds(shapes([batch] * 60, contexts))
            assert (np.diff(seconds) >= -1e-15).all()
        slower = predictor.seconds(shapes([2.0], [4096.0]))
        assert slower >= predictor.seconds(shapes([1.0], [4096.0]))

    def test_a_faster_device_is_never_slower(self) -> None:
        slow = transferred(DONORS, TARGET, "decode_attention", "bf16", "bf16")
        assert slow is not None
        facts = slow.facts
        fast = slow.artefact.predictor(replace(facts, bandwidth_bytes_per_s=2 * facts.bandwidth_bytes_per_s))
        shape, _ = sample_shapes(slow, {"head_dim": 128}, 100)
        assert (fast.seconds(shape) <= slow.seconds(shape) * (1 + 1e-12)).all()

    def test_no_donor_no_prediction(self) -> None:
        assert transferred((), TARGET, "decode_attention", "bf16", "bf16") is None
        assert transferred([artefact("h200-sxm")], TARGET, "decode_attention", "bf16", "bf16") is None
        assert transferred(DONORS, TARGET, "decode_attention", "bf16", "fp8") is None

    def test_an_artefact_of_an_unknown_device_is_named(self) -> None:
        with pytest.raises(Exception, match="calibration artefact: unknown device 'no-such-gpu'"):
            transferred([artefact("no-such-gpu")], TARGET, "decode_attention", "bf16", "bf16")

    def test_saved_and_read_it_predicts_the_same(self, tmp_path: Path) -> None:
        found = transferred_artefact(DONORS, TARGET, "decode_attention", "bf16", "bf16")
        assert found is not None
        path = found.save(tmp_path)
        assert (
            Artefact.model_validate({k: v for k, v in json.loads(path.read_text()).items() if k != "content_sha256"})
            == found
        )


class TestShapes:
    def test_samples_stay_in_the_domain_and_repeat(self) -> None:
        predictor = DONORS[0].predictor(device_facts(load_device("a100-sxm-80gb").spec))
        shape, seconds = sample_shapes(predictor, {"head_dim": 128}, 150)
        assert set(shape) == set(SHAPE_COLUMNS["decode_attention"])
        assert len(seconds) == 150
        assert predictor.in_domain(shape).all()
        assert (shape["num_heads"] % shape["num_kv_heads"] == 0).all()
        again, _ = sample_shapes(predictor, {"head_dim": 128}, 150)
        assert all((again[name] == shape[name]).all() for name in shape)

    def test_what_binds(self) -> None:
        shape = shapes([1.0, 64.0], [16.0, 32768.0])
        bandwidth = DONORS[1].predictor(device_facts(load_device("h100-sxm").spec))
        assert list(binding_terms(bandwidth, shape)) == ["latency", "bandwidth"]
        unpacking = artefact("h100-sxm", unpack_rate=0.02).predictor(bandwidth.facts)
        assert list(binding_terms(unpacking, shape))[1] == "instructions"
        assert set(BOUNDS) == {"latency", "bandwidth", "instructions"}


class TestBands:
    def test_wider_than_any_single_device_says(self) -> None:
        low, high = np.linspace(-0.3, -0.1, 51), np.linspace(0.1, 0.3, 51)
        band = band_of([low, high])
        assert band.log_low < -0.28
        assert band.log_high > 0.28
        assert band_of([low]).log_high > 0.0

    def test_without_errors_a_factor_of_two(self) -> None:
        band = transfer_bands("no_such_operation", "bf16", "bf16", "h100-sxm")["cold"]
        assert np.exp(band.log_high) == pytest.approx(2.0, rel=0.01)

    def test_shipped_bands_hold_four_of_five_rows_of_a_device_that_was_left_out(self) -> None:
        entries = load_errors()
        assert entries, "calibration/transfer/errors.json is missing: run tools/leave_one_device_out.py"
        shares = []
        for left in entries:
            band = transfer_bands(left.operation, left.dtype, left.kv_dtype, left.device).get(left.domain)
            if band is not None:
                ratios = np.asarray(left.log_quantiles)
                shares.append(float(((ratios >= band.log_low) & (ratios <= band.log_high)).mean()))
        assert len(shares) > 20
        assert 0.75 <= np.mean(shares) <= 0.88

    def test_a_device_does_not_speak_for_itself(self) -> None:
        one = load_errors()[0]
        wanted = (one.operation, one.dtype, one.kv_dtype)
        devices = {e.device for e in load_errors() if (e.operation, e.dtype, e.kv_dtype) == wanted}
        assert len(devices) > 2
        assert len({transfer_bands(*wanted, device)["cold"].log_high for device in devices}) > 1


class TestCompiled:
    def test_clocks_are_those_of_the_best_configuration(self) -> None:
        spec = load_device("h100-sxm").spec
        assert clocks_per_unit(entry(9.0), spec) == 9.0
        assert clocks_per_unit(entry(9.0), load_device("a100-sxm-80gb").spec) is None
        assert clocks_per_unit(entry(9.0, operation="append"), spec) is None
        assert clocks_per_unit(entry(9.0, compile_case="deepseek-v3"), spec) is None

    @pytest.mark.parametrize("bad", [{"unpriced": ["UTCHMMA"]}, {"loops_counted_once": 1}])
    def test_a_count_with_holes_is_no_count(self, bad: dict[str, object]) -> None:
        count = {"clocks": {"alu": 1.0}, "loops_counted_once": 0, "unpriced": []} | bad
        holed = entry(targets={"sm_90": {"configs": [{"count": count}]}})
        assert clocks_per_unit(holed, load_device("h100-sxm").spec) is None

    def test_more_clocks_take_more_time_and_the_basis_says_so(self) -> None:
        found = [compiled_predictor(entry(clocks), TARGET, DONORS) for clocks in (2.0, 40.0)]
        assert found[0] is not None
        assert found[1] is not None
        shape = shapes([64.0], [32768.0])
        assert found[1].seconds(shape) > 2.0 * found[0].seconds(shape)
        assert found[0].artefact.basis is Basis.COMPILED
        assert found[0].artefact.kernel == "kvsim/best"
        low, high = found[0].band(shape)
        assert low < 0.7
        assert high > 1.7

    def test_half_the_bytes_take_half_the_time_where_bandwidth_binds(self) -> None:
        found = compiled_predictor(entry(0.5), TARGET, DONORS)
        plain = transferred(DONORS, TARGET, "decode_attention", "bf16", "bf16")
        assert found is not None
        assert plain is not None
        shape = shapes([64.0], [65536.0])
        assert found.seconds(shape) == pytest.approx(0.5 * plain.seconds(shape), rel=0.05)

    def test_a_measured_kernel_sets_the_share_of_the_pipe(self) -> None:
        plain = artefact("h100-sxm")
        measured = artefact("h100-sxm", "kvsim/best", "int8", unpack_rate=0.8 * 256 / (9.0 * 64))
        before = compiled_artefact(entry(), TARGET, [plain])
        after = compiled_artefact(entry(), TARGET, [plain, measured])
        assert before is not None
        assert after is not None
        rates = [one.parts[0].cold["unpack_rate"] for one in (before, after)]
        assert rates[0] == pytest.approx(0.6 * 256 / (9.0 * 64), rel=1e-4)
        assert rates[1] == pytest.approx(0.8 * 256 / (9.0 * 64), rel=0.05)
        assert after.bands["cold"].log_high <= before.bands["cold"].log_high

    def test_unknown_formats_and_no_plain_kernel(self) -> None:
        assert compiled_predictor(entry(kv_format="no-such-format"), TARGET, DONORS) is None
        assert compiled_predictor(entry(), TARGET, ()) is None


def test_every_shipped_key_transfers_to_a_device_without_tables() -> None:
    artefacts = load_set("default").entries
    spec = load_device("rtx-5090").spec
    for operation, dtype, kv_dtype in sorted({(a.operation, a.dtype, a.kv_dtype) for a in artefacts}):
        predictor = transferred(artefacts, spec, operation, dtype, kv_dtype)
        if predictor is None:
            continue
        shape, seconds = sample_shapes(predictor, {}, 40)
        low, high = predictor.band(shape)
        assert np.isfinite(seconds).all(), (operation, dtype, kv_dtype)
        assert (seconds > 0).all()
        assert (low <= 1.0).all()
        assert (high >= 1.0).all()
