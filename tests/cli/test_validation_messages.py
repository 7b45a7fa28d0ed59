"""What a person reads when a scenario is wrong."""

import pytest

from kvsim.catalog import resolve
from kvsim.documents import validate
from kvsim.errors import InvalidSpec
from kvsim.field_paths import check_dotted_key, dotted_keys
from kvsim.scenario import Scenario

SMALLEST = {"model": "llama-3.1-8b", "device": "h100-sxm", "workload": "chat"}


def message(**changes: object) -> str:
    with pytest.raises(InvalidSpec) as caught:
        validate(Scenario, SMALLEST | changes, "s.yaml", require_units=True)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"workload": {"kind": "trace", "format": "azur", "path": "x"}},
            "s.yaml: workload.format: 'azur' is not allowed; allowed: azure, mooncake, burstgpt, vllm_bench, sharegpt, "
            "columns; did you mean 'azure'?",
        ),
        (
            {"workload": {"kind": "trce"}},
            "s.yaml: workload.kind: 'trce' is not allowed; allowed: synthetic, trace; did you mean 'trace'?",
        ),
        ({"engine": {"max_num_seq": 1}}, "s.yaml: engine.max_num_seq: unknown key; did you mean 'max_num_seqs'?"),
        ({"max_num_seqs": 1}, "s.yaml: max_num_seqs: unknown key; did you mean 'engine.max_num_seqs'?"),
        ({"engine": {"block_size": 5}}, "s.yaml: engine.block_size: 5 is not allowed; allowed: 1, 8, 16, 32, 64, 128"),
        (
            {"slo": {"ttft_s": 5}},
            "s.yaml: slo.ttft_s: duration 5 has no unit; write it as a string such as '5 s' (got 5)",
        ),
        ({"engine": 3}, "s.yaml: engine: must be a mapping of keys and values (got 3)"),
    ],
)  # fmt: skip
def test_one_line_names_the_key_and_what_is_allowed(changes, expected):
    assert message(**changes) == expected


def test_a_strategy_that_does_not_exist_names_the_file():
    assert message(compression="fpp8").startswith("s.yaml: unknown strategy 'fpp8'; did you mean 'fp8'")


def test_no_line_speaks_of_pydantic_unions():
    text = message(
        workload={"kind": "synthetic", "input_len": {"kind": "lognormal", "median": 3}, "arrivals": {"kind": "poison"}}
    )
    assert "workload.input_len.median: unknown key; did you mean 'median_tokens'?" in text
    assert "workload.arrivals.kind: 'poison' is not allowed" in text
    assert "tagged-union" not in text
    assert "valid string" not in text


def test_many_problems_are_counted_not_listed():
    text = message(**{f"key{i}": i for i in range(30)})
    assert len(text.splitlines()) == 9
    assert text.endswith("and 22 more problems")


def test_long_values_are_cut():
    assert len(message(engine="x" * 10_000)) < 300


@pytest.mark.parametrize(
    "key", ["model", "engine.max_num_seqs", "workload.arrivals.request_rate", "slo.ttft_s", "compression.encoding.kind"]
)
def test_existing_keys_pass(key):
    check_dotted_key(Scenario, key, "--set")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("engin.max_num_seqs", "did you mean 'engine'?"),
        ("engine.max_num_seq", "did you mean 'max_num_seqs'?"),
        ("model.name", "nothing may be set below it"),
        ("max_num_seqs", "did you mean 'engine.max_num_seqs'?"),
    ],
)
def test_unknown_keys_are_refused_with_a_hint(key, hint):
    with pytest.raises(InvalidSpec) as caught:
        check_dotted_key(Scenario, key, "--set")
    assert str(caught.value).startswith(f"--set: {key}: unknown key")
    assert hint in str(caught.value)


def test_every_listed_dotted_key_is_accepted():
    for key in set(dotted_keys(Scenario)):
        check_dotted_key(Scenario, key, "--set")


SPECULATIVE = {"method": "eagle3", "num_speculative_tokens": 3, "acceptance_rate": 0.7}
NVME = {"kind": "nvme", "size": "5 GiB", "read_bandwidth": "7 GB/s", "write_bandwidth": "5 GB/s", "latency_s": "1 us"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"engine": {"kind": [1]}}, "s.yaml: engine.kind: [1] is not allowed; allowed: vllm, sglang, tensorrt_llm, "),
        ({"engine": {"kind": {"x": 1}}}, "s.yaml: engine.kind: {'x': 1} is not allowed; allowed: vllm, "),
        (
            {"engine": {"speculative_config": SPECULATIVE | {"acceptance_rate": 1.5}}},
            "s.yaml: engine.speculative_config.acceptance_rate: Input should be less than or equal to 1 (got 1.5)",
        ),
        (
            {"engine": {"speculative_config": SPECULATIVE | {"method": "draft_model"}}},
            "s.yaml: engine.speculative_config: method draft_model needs model, the draft model's name, path or id",
        ),
        (
            {"engine": {"kind": "sglang", "page_size": 7}},
            "s.yaml: engine.page_size: 7 is not allowed; allowed: 1, 8, 16, 32, 64, 128",
        ),
        (
            {"engine": {"kind": "tensorrt_llm", "max_num_tokens": "x"}},
            "s.yaml: engine.max_num_tokens: Input should be a valid integer",
        ),
        ({"adaptive": {"levels": "fp8"}}, "s.yaml: adaptive.levels: must be a list (got 'fp8')"),
        ({"adaptive": {"levels": []}}, "s.yaml: adaptive.levels: must have at least 1 items, and has 0"),
        ({"adaptive": {"levels": ["fp8"] * 9}}, "s.yaml: adaptive.levels: must have at most 8 items, and has 9"),
        ({"adaptive": {"levels": [1]}}, "s.yaml: adaptive.levels.0: must be a mapping of keys and values (got 1)"),
        (
            {"adaptive": {"levels": ["native", "fpp8"]}},
            "s.yaml: adaptive.levels.1: unknown strategy 'fpp8'; did you mean 'fp8'",
        ),
        (
            {"adaptive": {"levels": ["native", "fp8"], "policy": {"kind": "static", "high_watermark": 0.5}}},
            "s.yaml: adaptive.policy.high_watermark: unknown key; allowed: kind, level",
        ),
        (
            {"engine": {"kv_tiers": [NVME | {"link": "roce-400"}]}},
            "s.yaml: engine.kv_tiers.0.link: unknown key; allowed: coder, decode_rate, ",
        ),
    ],
)  # fmt: skip
def test_serving_fields_are_refused_in_one_line(changes, expected):
    text = message(**changes)
    assert text.startswith(expected)
    assert len(text.splitlines()) == 1


def test_an_item_of_a_list_is_not_set_by_its_number():
    with pytest.raises(InvalidSpec, match=r"a list is set as a whole, such as engine.kv_tiers=\[...\]"):
        check_dotted_key(Scenario, "engine.kv_tiers.0.size", "--set")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"engine": {"kv_cache_dtype_skip_layers": [99]}}, "engine.kv_cache_dtype_skip_layers"),
        ({"engine": {"kv_cache_dtype_skip_layers": [-1]}}, "engine.kv_cache_dtype_skip_layers"),
        (
            {"adaptive": {"levels": ["native", {"compression": "fp8", "kv_cache_dtype_skip_layers": [32]}]}},
            "adaptive.levels.1.kv_cache_dtype_skip_layers",
        ),
    ],
)
def test_layers_that_a_model_lacks_are_refused(changes, field):
    with pytest.raises(InvalidSpec, match=rf"^{field}: -?\d+ is not a layer of llama-3.1-8b; allowed: 0 to 31"):
        resolve(validate(Scenario, SMALLEST | changes, "s.yaml"))
