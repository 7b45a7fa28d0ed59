"""Fitted kernels in the price of a step: which are chosen, what they are made into, and what a report says of it."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cost_cases import decode_s, deploy, prefill_s, step_model
from hypothesis import given
from hypothesis import strategies as st

from kvsim.closed_form import decode_split
from kvsim.cost.basis import component_basis, kernel_notes, pricings, weakest
from kvsim.cost.calibrated import CalibratedGemm, NodeTable, PrefillTable, row_nodes
from kvsim.cost.kernels import AttentionShape
from kvsim.cost.linear import linear_kernels
from kvsim.cost.priors import Edge
from kvsim.cost.projection import ServingRange, attention_kernels, decode_price
from kvsim.ops import Component
from kvsim.scenario import Scenario
from kvsim.simulate import estimate
from kvsim.specs.base import Basis

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT / "tools"))

import accuracy_quantities  # noqa: E402
from write_datasheet_accuracy import published_figures  # noqa: E402

SHAPE = AttentionShape(num_heads=32, num_kv_heads=8, head_dim=128, window_tokens=0, is_latent=False)
SERVING = ServingRange(256, 65_536, 2**20, 4096.0, 50e6)
CALIBRATED = ("h100-sxm", "a100-sxm-80gb", "b200-sxm", "l40s")


def stand_in(seconds, log_low: float = -0.1, log_high: float = 0.1):
    """A kernel whose time is a function of (batch, context)."""

    def band(shape):
        ones = np.ones(len(shape["batch"]))
        return ones * np.exp(log_low), ones * np.exp(log_high)

    predictor = SimpleNamespace(
        seconds=lambda shape: seconds(shape["batch"], shape["context_tokens"]),
        band=band,
        facts=SimpleNamespace(bandwidth_bytes_per_s=3e12),
    )
    return SimpleNamespace(predictor=predictor, artefact=SimpleNamespace(basis=Basis.FITTED, kernel="test/affine"))


class Hashable(SimpleNamespace):
    __hash__ = object.__hash__


def kernel_of(seconds, **band):
    return Hashable(**vars(stand_in(seconds, **band)))


@given(
    launch=st.floats(1e-6, 1e-4), per_sequence=st.floats(0, 1e-6), per_token=st.floats(1e-10, 1e-7),
)  # fmt: skip
def test_an_affine_kernel_is_projected_onto_itself(launch, per_sequence, per_token):
    kernel = kernel_of(lambda batch, context: launch + per_sequence * batch + per_token * batch * context)
    price = decode_price(kernel, SHAPE, SERVING)
    assert price.launch_s == pytest.approx(launch, rel=1e-6)
    assert price.per_token_s == pytest.approx(per_token, rel=1e-6)
    assert price.per_sequence_s == pytest.approx(per_sequence, rel=1e-4, abs=1e-6 * launch)
    assert price.p90_error < 1e-6
    # Nothing is added to the kernel's own band.
    assert price.log_low == pytest.approx(-0.1, abs=1e-6)
    assert price.log_high == pytest.approx(0.1, abs=1e-6)


def test_a_kernel_that_is_not_affine_has_its_misfit_stated_and_in_the_band():
    def bent(batch, context):
        return 1e-5 + 1e-9 * batch * context * (1.0 + 0.3 * np.sin(np.log2(batch * context)))

    price = decode_price(kernel_of(bent), SHAPE, SERVING)
    assert 0.02 < price.median_error < price.p90_error < 0.5
    assert price.log_low < -0.1
    assert price.log_high > 0.1
    assert min(price.launch_s, price.per_sequence_s, price.per_token_s) >= 0.0
    for edge, factor in ((Edge.OPTIMISTIC, price.log_low), (Edge.CENTRAL, 0.0), (Edge.PESSIMISTIC, price.log_high)):
        assert price.factor(edge) == pytest.approx(np.exp(factor))


def test_a_cache_that_fits_the_l2_is_priced_as_read_from_memory():
    """Timings that repeat a call find a small cache in the L2; between two calls of an engine it is gone."""
    cold_tokens = 2 * SERVING.cache_bytes / SERVING.layer_bytes_per_token

    def measured(batch, context):
        tokens = batch * context
        return 1e-5 + 1e-9 * np.where(tokens < cold_tokens, 0.1 * tokens, tokens)

    price = decode_price(kernel_of(measured), SHAPE, SERVING)
    assert price.per_token_s == pytest.approx(1e-9, rel=0.02)
    assert price.launch_s == pytest.approx(1e-5, rel=0.05)


@given(
    steps=st.lists(st.floats(1e-9, 1.0), min_size=3, max_size=30),
    counts=st.lists(st.floats(0, 500), min_size=1, max_size=20),
)
def test_a_table_is_the_same_for_one_count_and_for_many_and_never_falls(steps, counts):
    nodes = np.cumsum(np.arange(1, len(steps) + 1, dtype=np.float64))
    table = NodeTable(nodes, np.asarray(steps))
    counts = sorted(counts)
    alone = [table(count) for count in counts]
    assert np.asarray(table(np.asarray(counts))) == pytest.approx(alone, rel=1e-12)
    assert all(after >= before * (1 - 1e-12) for before, after in itertools.pairwise(alone))
    assert np.asarray(table(nodes)) == pytest.approx(np.maximum.accumulate(steps))
    assert table(0.0) == pytest.approx(steps[0])


def test_rows_are_dense_where_engines_run():
    nodes = row_nodes()
    assert (np.diff(nodes) > 0).all()
    assert set(range(1, 17)) <= set(nodes.tolist())
    assert {24, 64, 256, 272, 512, 1024, 8192} <= set(nodes.tolist())


def test_prefill_attention_between_nodes_is_within_one_per_cent():
    chunks, contexts = 2.0 ** (np.arange(0, 60) / 4), np.concatenate([[0.0], 64 * 2.0 ** (np.arange(0, 22) / 2)])

    def pairs(chunk, context):
        return chunk * context + chunk * (chunk + 1) / 2

    table = PrefillTable(chunks, contexts, pairs(chunks[:, None], contexts[None, :]))
    for chunk, context in itertools.product((3, 100, 777, 5000), (0, 50, 1000, 40_000)):
        assert table(chunk, context) == pytest.approx(pairs(chunk, context), rel=0.01)
        assert np.asarray(table(np.array([chunk], float), context)) == pytest.approx([table(chunk, context)])


@pytest.mark.parametrize("device", CALIBRATED)
def test_fitted_kernels_price_linear_layers_and_attention(device):
    deployment = deploy("llama-3.1-8b", device, calibration="default")
    step = step_model(deployment)
    assert all(isinstance(gemm, CalibratedGemm) for gemm in (*step.gemms, step.head))
    (kernels,) = attention_kernels(deployment)
    assert kernels.decode is kernels.native_decode
    assert kernels.decode is not None
    assert kernels.prefill is not None
    assert kernels.decode.price.median_error < 0.15
    bases = component_basis(deployment)
    assert bases[Component.WEIGHTS] == bases[Component.ATTENTION] == Basis.FITTED
    assert bases[Component.OVERHEAD] == Basis.DATASHEET
    assert kernel_notes(deployment) == ()


def test_without_a_set_nothing_is_fitted():
    deployment = deploy("llama-3.1-8b", "h100-sxm")
    assert all(pricing.kernel is None for pricing in pricings(deployment))
    assert kernel_notes(deployment) == ()
    assert Basis.FITTED not in component_basis(deployment).values()


def test_experts_keep_the_datasheets_form_and_the_report_says_so():
    deployment = deploy("qwen3-30b-a3b", "h100-sxm", calibration="default")
    linear = linear_kernels(deployment)
    for gemm in step_model(deployment).gemms:
        assert isinstance(gemm, CalibratedGemm) == (gemm.gemm.num_experts == 0)
        assert (linear.of(gemm.gemm) is None) == (gemm.gemm.num_experts > 0)
    assert any("experts" in note and note.endswith("priors") for note in kernel_notes(deployment))
    assert component_basis(deployment)[Component.WEIGHTS] is Basis.DATASHEET


def test_a_format_without_a_kernel_is_launched_and_read_like_the_models_own():
    plain, packed = (
        deploy("llama-3.1-8b", "h100-sxm", name, calibration="default") for name in ("native", "int4_per_token_head")
    )
    (kernels,) = attention_kernels(packed)
    if kernels.decode is not None:
        pytest.skip("the set has a kernel for the format")
    floors = [step_model(one).decode_fixed_seconds(8)[0] for one in (plain, packed)]
    assert floors[0] == pytest.approx(floors[1], rel=0.05)
    assert any("int4_per_token_head" in note for note in kernel_notes(packed))
    split = decode_split(step_model(packed), 1, 60_000, 0)
    encoded = packed.layer_classes[0].encoding.bytes_per_token(packed.layer_classes[0].group, packed.model.dtype)
    moved_s = 32 * 60_000 * encoded.total_bytes / kernels.native_decode.stream_bytes_per_s(Edge.CENTRAL)
    floor_s = step_model(packed).decode_fixed_seconds(1)[0]
    assert split[Component.ATTENTION] == pytest.approx(moved_s + floor_s, rel=0.01)
    assert split[Component.COMPRESSION] > 0


class OwnKernels:
    """A set that has kvsim's own kernel for one more format: another artefact under its name."""

    name = "with own"

    def __init__(self, real, kv_dtype):
        self.real, self.kv_dtype = real, kv_dtype
        found = real.find("h100-sxm", "decode_attention", dtype="bf16", kv_dtype="fp8")
        self.own = found.model_copy(update={"kernel": "kvsim/best"})

    def newest_of_engines(self, device, operation, *, dtype, kv_dtype=""):
        return self.real.newest_of_engines(device, operation, dtype=dtype, kv_dtype=kv_dtype)

    def find(self, device, operation, *, kernel="auto", dtype, kv_dtype=""):
        if (operation, dtype, kv_dtype) == ("decode_attention", "bf16", self.kv_dtype) and kernel in (
            "auto",
            "kvsim/best",
        ):
            return self.own
        return self.real.find(device, operation, kernel=kernel, dtype=dtype, kv_dtype=kv_dtype)

    def predictor(self, artefact, device):
        return self.real.predictor(artefact, device)


def test_kvsims_own_kernel_serves_formats_that_no_engine_ships():
    plain = deploy("llama-3.1-8b", "h100-sxm", "int4_per_token_head", calibration="default")
    own = dataclasses.replace(plain, calibration=OwnKernels(plain.calibration, "int4_per_token_head"))
    (kernels,) = attention_kernels(own)
    assert kernels.decode is not None
    assert kernels.decode.kernel.artefact.kernel == "kvsim/best"
    assert kernels.native_decode.kernel.artefact.kernel.startswith("vllm/")
    assert any("kvsim's own kvsim/best" in note for note in kernel_notes(own))


def test_the_scenarios_kernel_is_taken_where_it_has_the_format():
    deployment = deploy("llama-3.1-8b", "h100-sxm", calibration="default")
    names = deployment.calibration.kernels("h100-sxm", "decode_attention")
    other = next(name for name in names if not name.startswith(("vllm/", "kvsim/")))
    chosen = dataclasses.replace(deployment, engine=deployment.engine.model_copy(update={"attention_kernel": other}))
    (default,), (kernels,) = attention_kernels(deployment), attention_kernels(chosen)
    assert kernels.decode.kernel.artefact.kernel == other != default.decode.kernel.artefact.kernel
    assert decode_s(step_model(chosen), 32, 8000) != decode_s(step_model(deployment), 32, 8000)


def test_llama_cpp_runs_no_kernel_of_other_engines():
    deployment = deploy("llama-3.1-8b", "h100-sxm", engine="llamacpp", calibration="default")
    same = deploy("llama-3.1-8b", "h100-sxm", engine="llamacpp")
    assert all(pricing.kernel is None for pricing in pricings(deployment))
    assert decode_s(step_model(deployment), 1, 1000) == decode_s(step_model(same), 1, 1000)


@pytest.mark.parametrize("device", ["h100-sxm", "b200-sxm"])
def test_fitted_bands_are_narrower_than_those_of_priors(device):
    def width(calibration, seconds):
        deployment = deploy("llama-3.1-8b", device, calibration=calibration)
        fast, slow = (seconds(step_model(deployment, edge)) for edge in (Edge.OPTIMISTIC, Edge.PESSIMISTIC))
        return slow / fast

    for seconds in (lambda step: decode_s(step, 32, 4000), lambda step: prefill_s(step, 4000)):
        assert width("default", seconds) < width("datasheet", seconds)


ANCHORS = [entry for entry in published_figures() if "Llama-3.1-8B" in entry["name"]]


@pytest.mark.parametrize("entry", ANCHORS, ids=lambda entry: entry["name"])
def test_fitted_kernels_agree_with_vllms_own_figures(entry, monkeypatch):
    """Engine runs that no fit has seen: as near as is stated for priors."""
    resolved = accuracy_quantities.deploy.__wrapped__

    def calibrated(*args, **kwargs):
        deployment = resolved(*args, **kwargs)
        return deploy(deployment.model.name, deployment.device.name, deployment.compression.name, calibration="default")

    monkeypatch.setattr(accuracy_quantities, "deploy", calibrated)
    quantity = accuracy_quantities.QUANTITIES[entry["quantity"]]
    ratio = quantity(Edge.CENTRAL, **entry["given"]) / entry["published"]
    assert 1 / entry["tolerance"] <= ratio <= entry["tolerance"], (ratio, entry["because"])


def test_a_report_names_its_kernels_and_the_share_that_they_price():
    base = {"model": "llama-3.1-8b", "device": "h100-sxm", "workload": "chat"}
    fitted, datasheet = (
        estimate(Scenario.model_validate(base | {"calibration": name})) for name in ("default", "datasheet")
    )
    assert fitted.provenance.calibration == "default"
    assert {one.operation for one in fitted.provenance.kernels} == {
        "linear layers", "decode attention", "prefill attention",
    }  # fmt: skip
    assert all(len(one.artefact) == 12 for one in fitted.provenance.kernels)
    shares = {one.basis: one.share for one in fitted.coverage}
    assert shares[Basis.FITTED] > 0.8
    assert sum(shares.values()) == pytest.approx(1.0)
    assert datasheet.provenance.kernels == ()
    assert {one.basis for one in datasheet.coverage} == {Basis.DATASHEET, Basis.LITERATURE}


def test_the_weakest_basis_is_the_one_farthest_from_a_measurement():
    assert weakest([Basis.FITTED, Basis.MEASURED]) is Basis.FITTED
    assert weakest([Basis.TRANSFERRED, Basis.COMPILED]) is Basis.TRANSFERRED
    assert weakest([Basis.LITERATURE, Basis.DATASHEET]) is Basis.LITERATURE
