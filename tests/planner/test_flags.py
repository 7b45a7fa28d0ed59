"""Commands: every row of the engines' tables is a strategy, and flags are the engine's."""

from __future__ import annotations

import shlex

import pytest

from kvsim.compression import parse_compression
from kvsim.device_catalog import load_device
from kvsim.planner.flags import NOT_SHIPPED, commands, engine_commands, not_shipped, shipped_by
from kvsim.planner.screen import Candidate
from kvsim.planner.settings import Layout
from kvsim.specs.engine import EngineSpec

MODEL = "meta-llama/Llama-3.1-8B-Instruct"


def candidate(strategy="fp8", device="h100-sxm", ranks=1, replicas=1, **engine):
    return Candidate(device, parse_compression(strategy), Layout(ranks, replicas), EngineSpec.model_validate(engine))


def lines(one):
    return {c.engine: c.line for c in commands(one, load_device(one.device).spec, MODEL, 8192)}


def test_every_row_has_a_source_and_a_strategy():
    for table in engine_commands():
        names = [row.strategy for row in table.strategies]
        assert len(set(names)) == len(names)
        assert "native" in names
        for row in table.strategies:
            assert row.source
            assert parse_compression(row.strategy).refused_in_pool is None


def test_vllm_first_then_what_else_ships_it():
    found = lines(candidate(ranks=2, max_num_seqs=128, gpu_memory_utilization=0.9))
    assert list(found) == ["vLLM", "SGLang", "TensorRT-LLM"]
    assert found["vLLM"] == (
        f"vllm serve {MODEL} --kv-cache-dtype fp8 --tensor-parallel-size 2 --max-num-seqs 128 "
        "--max-num-batched-tokens 8192 --gpu-memory-utilization 0.9"
    )
    assert "--kv-cache-dtype fp8_e4m3 --tp 2 --max-running-requests 128" in found["SGLang"]
    assert "--kv_cache_dtype fp8 --tp_size 2 --max_batch_size 128" in found["TensorRT-LLM"]


def test_llama_cpp_takes_types_of_k_and_v_and_a_context_for_all_slots():
    one = candidate("q8_0/q4_0", "apple-m4-max", kind="llamacpp", max_num_seqs=4)
    words = shlex.split(lines(one)["llama.cpp"])
    assert words[words.index("--cache-type-k") + 1] == "q8_0"
    assert words[words.index("--cache-type-v") + 1] == "q4_0"
    assert words[words.index("--ctx-size") + 1] == str(4 * 8192)
    assert list(lines(one)) == ["llama.cpp"]


def test_what_no_engine_ships_has_no_command():
    assert not lines(candidate("snapkv"))
    assert not_shipped(candidate("snapkv")) == NOT_SHIPPED
    assert "llama.cpp" in not_shipped(candidate("q8_0"))
    assert not_shipped(candidate("fp8")) is None


@pytest.mark.parametrize(
    ("strategy", "device", "engine"),
    [("fp8", "h100-sxm", "vLLM"), ("fp8", "mi300x", "vLLM"), ("fp8", "tpu-v6e", None), ("native", "tpu-v6e", "vLLM"),
     ("turboquant_4bit_nc", "h200-sxm", "vLLM"), ("turboquant_4bit_nc", "mi300x", None), ("kivi-2", "h100-sxm", None)],
)  # fmt: skip
def test_a_vendor_that_the_source_leaves_out_is_no_proof(strategy, device, engine):
    assert shipped_by(candidate(strategy, device), load_device(device).spec.vendor) == engine


def test_replicas_and_needs_are_said():
    found = commands(candidate("int8_per_token_head", replicas=4), load_device("h100-sxm").spec, MODEL, 8192)
    assert "4 of these behind a router" in found[0].remark
    assert "Triton" in found[0].needs
    assert found[0].since == "0.28.0"
