"""One library call timed by several engines is priced by their mean; calls that differ are not."""

from __future__ import annotations

import numpy as np
import pytest
from cost_cases import deploy

from kvsim.cost.linear import linear_kernels
from kvsim.cost.mean_kernel import MeanKernel, mean_of
from kvsim.cost.priors import Edge

ROWS = np.array([1.0, 8.0, 24.0, 64.0, 512.0, 8192.0])
SHAPE = {"m": ROWS, "n": np.full(len(ROWS), 8192.0), "k": np.full(len(ROWS), 7168.0)}


@pytest.mark.parametrize("device", ["h100-sxm", "b200-sxm", "l40s", "a100-sxm-80gb"])
def test_sixteen_bit_products_are_the_mean_of_three_engines(device: str):
    kernel = linear_kernels(deploy("llama-3.1-8b", device, calibration="default")).layers
    assert isinstance(kernel, MeanKernel)
    assert [member.framework for member in kernel.members] == ["vllm", "sglang", "trtllm"]
    members = np.stack([member.at_edges(SHAPE)[Edge.CENTRAL] for member in kernel.members])
    edges = kernel.at_edges(SHAPE)
    assert edges[Edge.CENTRAL] == pytest.approx(np.exp(np.log(members).mean(0)))
    assert (members.min(0) <= edges[Edge.CENTRAL]).all()
    assert (edges[Edge.CENTRAL] <= members.max(0)).all()
    assert (edges[Edge.OPTIMISTIC] < edges[Edge.CENTRAL]).all()
    assert (edges[Edge.CENTRAL] < edges[Edge.PESSIMISTIC]).all()
    assert all(member.artefact_id in kernel.source for member in kernel.members)


def test_a_mean_of_one_kernel_is_that_kernel():
    one = linear_kernels(deploy("llama-3.1-8b", "h100-sxm", calibration="default")).layers
    assert one is not None
    single = one.members[0]
    mean = mean_of((single,)).at_edges(SHAPE)
    for edge, values in single.at_edges(SHAPE).items():
        assert mean[edge] == pytest.approx(values)
    assert mean_of((single,)) is mean_of((single,))


def test_products_that_each_engine_does_in_its_own_way_keep_one_source():
    quantised = linear_kernels(deploy("llama-4-scout-fp8", "h100-sxm", calibration="default"))
    assert quantised.layers is not None
    assert len(quantised.layers.members) == 1
    assert quantised.head is not None
    assert len(quantised.head.members) == 3
    llamacpp = deploy("llama-3.1-8b", "h100-sxm", engine="llamacpp", calibration="default")
    assert linear_kernels(llamacpp).layers is None
