"""FP8 linear layers that get their input in 8 bits cost what tables say, less the quantisation that these include."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvsim.cost.fused_input import FusedInputKernel
from kvsim.cost.linear import linear_kernels
from kvsim.cost.priors import Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.step import StepModel
from kvsim.deployment import Deployment
from kvsim.specs.engine import EngineSpec
from kvsim.validation.deployments import Setup, deploy
from kvsim.validation.suite import Options

DEVICES = ("h100-sxm", "b200-sxm")
SHAPES = {"m": np.array([1.0, 64.0, 8192.0]), "n": np.array([1280.0, 8192.0, 57344.0]), "k": np.full(3, 8192.0)}


def served(device: str, weights: str, *, fused: bool) -> Deployment:
    engine = EngineSpec(fused_input_quantization=fused)
    return deploy(Setup("llama-3.1-70b", device, "fp8", weights, 8, engine), Options())


@pytest.mark.parametrize("device", DEVICES)
def test_every_shape_is_quicker_by_the_same_microseconds(device):
    plain, fused = (linear_kernels(served(device, "fp8", fused=one)).layers for one in (False, True))
    assert isinstance(fused, FusedInputKernel)
    assert 1e-6 < fused.quantisation_s < 10e-6
    for edge in Edge:
        saved = plain.at_edges(SHAPES)[edge] - fused.at_edges(SHAPES)[edge]
        assert saved == pytest.approx(fused.quantisation_s)
    assert "quantising" in fused.source


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_is_never_quicker_than_the_smallest_in_16_bits(device):
    linear = linear_kernels(served(device, "fp8", fused=True))
    smallest = {name: np.array([low]) for name, (low, _) in linear.layers.artefact.domain.items()}
    for edge in Edge:
        assert linear.layers.at_edges(smallest)[edge][0] >= 0.999 * linear.head.at_edges(smallest)[edge][0]


@pytest.mark.parametrize("weights", ["bf16", "fp4"])
def test_other_formats_cost_what_they_did(weights):
    plain, fused = (linear_kernels(served("b200-sxm", weights, fused=one)).layers for one in (False, True))
    assert plain is fused


def test_a_step_saves_it_once_for_each_linear_layer():
    first, other = (served("b200-sxm", "fp8", fused=one) for one in (False, True))
    other = replace(other, calibration=first.calibration)
    layers = linear_kernels(other).layers
    assert isinstance(layers, FusedInputKernel)
    rates = build_rates(first.device, first.priors, Edge.CENTRAL)
    saved = StepModel(first, rates).token_terms(8.0).weights_s - StepModel(other, rates).token_terms(8.0).weights_s
    assert saved == pytest.approx(80 * 4 * layers.quantisation_s, rel=0.02)
