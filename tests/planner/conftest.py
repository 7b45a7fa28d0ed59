"""Small requests: few strategies and settings, so that a plan takes a second."""

from __future__ import annotations

import pytest

from kvsim.planner import PlanRequest
from kvsim.workload_catalog import load_workload

FEW = ("native", "fp8", "int8_per_token_head", "int4_per_token_head", "snapkv:0.5", "knorm:0.9", "kivi-2", "quest")


@pytest.fixture
def make_request():
    """A request of a closed loop of 64 clients unless told otherwise; keywords are fields."""

    def make(**changed):
        workload = load_workload("chat").model_dump(mode="json")
        workload |= {"num_prompts": 150, "arrivals": {"kind": "concurrency", "max_concurrency": 64}}
        search = {
            "strategies": FEW, "max_num_seqs": [64, 256], "max_num_batched_tokens": [8192],
            "gpu_memory_utilization": [0.92], "max_devices": 4,
        }  # fmt: skip
        document = {
            "model": "llama-3.1-8b", "devices": ["h100-sxm"], "workload": workload, "search": search, "simulate": 0,
        }  # fmt: skip
        document |= {key: value for key, value in changed.items() if key != "search"}
        document["search"] = search | changed.get("search", {})
        return PlanRequest.model_validate(document)

    return make
