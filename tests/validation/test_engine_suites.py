"""Suites of engine-level data: tables, runs and request logs, each on a small made-up file."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
from made_up_data import (
    APPLE,
    KV_QUANT,
    META,
    MI300X,
    RUN,
    SILICON,
    TRTLLM,
    log_rows,
    write_csv,
    write_json,
    write_log,
)

from kvsim.errors import InvalidSpec, TraceError
from kvsim.validation import Options, edge, engine_rows, engine_tables, kv_quant, vllm_requests, vllm_serving
from kvsim.validation.kv_quant import Load, read_load
from kvsim.validation.suite import Tally
from kvsim.validation.vllm_serving import Run, requests_of


def counts(result) -> dict[str, int]:
    return {one.reason: one.count for one in result.skipped}


# --- engine-tables ---------------------------------------------------------------------------------------------------


def test_silicon_rows_score_ttft_and_tpot(run, tmp_path):
    found = run("engine-tables", write_csv(tmp_path / "silicon.csv", [SILICON, SILICON | {"isl": 512}]))
    assert found.rows == 2
    assert {metric: one.n for metric, one in found.overall.items()} == {"ttft": 2, "tpot": 2}
    assert {"device=h100-sxm", "model=qwen3-32b", "ranks=2", "backend=vllm"} <= set(found.groups)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mode": "disagg"}, engine_rows.DISAGGREGATED),
        ({"pp_size": 2}, engine_rows.PIPELINE),
        ({"attention_dp_size": 4}, engine_rows.DATA_PARALLEL),
        ({"moe_ep_size": 8}, engine_rows.EXPERT_PARALLEL),
        ({"precision": "int3"}, engine_rows.UNKNOWN_WEIGHTS),
        ({"model_path": "someone/else"}, engine_rows.UNKNOWN_MODEL),
        ({"system": "some_gpu"}, engine_rows.UNKNOWN_DEVICE),
        ({"tp_size": 16}, engine_rows.MANY_RANKS),
        ({"isl": ""}, engine_rows.NO_LENGTHS),
        ({"silicon_ttft_ms": "", "silicon_tpot_ms": "nan"}, engine_rows.NO_FIGURE),
        ({"silicon_data_source": "", "batch_size": ""}, engine_rows.NO_CONCURRENCY),
        ({"tp_size": 3}, "cannot be deployed: IncompatibleScenario"),
        ({"precision": "bf16", "model_path": "meta-llama/Llama-3.1-405B"}, "cannot be deployed: WeightsDoNotFit"),
    ],
)
def test_silicon_rows_that_cannot_be_expressed_are_named(run, tmp_path, change, reason):
    found = run("engine-tables", write_csv(tmp_path / "silicon.csv", [SILICON | change]))
    assert (found.rows, counts(found)) == (0, {reason: 1})


def test_one_token_has_no_tpot(run, tmp_path):
    found = run("engine-tables", write_csv(tmp_path / "silicon.csv", [SILICON | {"osl": 1}]))
    assert set(found.overall) == {"ttft"}
    assert counts(found) == {engine_tables.NO_PREDICTION: 1}


def test_a_faster_measurement_raises_the_bias(run, tmp_path):
    slow = run("engine-tables", write_csv(tmp_path / "a.csv", [SILICON])).overall["tpot"].bias
    fast = (
        run("engine-tables", write_csv(tmp_path / "b.csv", [SILICON | {"silicon_tpot_ms": 6.0}])).overall["tpot"].bias
    )
    assert fast == pytest.approx(2 * (1 + slow) - 1)


def test_every_table_of_the_folder_is_read(run, tmp_path):
    folder = tmp_path / "engine_tables"
    write_csv(folder / "silicon_sample.csv", [SILICON])
    write_csv(folder / "trtllm.csv", [TRTLLM, TRTLLM | {"pp": 2}, TRTLLM | {"output_tok_s": 0}])
    write_csv(folder / "mi300x.csv", [MI300X, MI300X | {"metric": "throughput tok/s"}])
    write_csv(folder / "kv.csv", [KV_QUANT])
    write_csv(folder / "neuron.csv", [{"Scenario (all using BF16)": "Fused speculative decoding", "TTFT": 1}])
    found = run("engine-tables", tmp_path)
    assert found.rows == 4
    assert set(found.overall) == {"ttft", "tpot", "output_tok_s"}
    assert counts(found) == {
        engine_rows.NO_FIGURE: 1, engine_rows.UNCLEAR_TOKENS: 1, engine_rows.OTHER_TABLE: 1, engine_rows.SPECULATIVE: 1,
    }  # fmt: skip


def test_as_unseen_scores_that_device_alone(run, tmp_path):
    folder = tmp_path / "engine_tables"
    write_csv(folder / "silicon_sample.csv", [SILICON, SILICON | {"system": "b200_sxm"}])
    found = run("engine-tables", tmp_path, as_unseen="b200")
    assert (found.rows, counts(found)) == (1, {engine_rows.OTHER_UNSEEN: 1})


def test_gpt_oss_keeps_the_format_of_its_checkpoint(tmp_path, run):
    path = write_csv(tmp_path / "silicon.csv", [SILICON])
    rows, map_row = engine_tables._read_table(path, Tally())
    case = map_row(rows[0] | {"model_path": "openai/gpt-oss-120b", "precision": "fp4"}, Options())
    assert case.setup.weights is None


# --- vllm-serving ----------------------------------------------------------------------------------------------------


def test_each_stage_of_a_run_is_scored(run, tmp_path):
    found = run("vllm-serving", write_json(tmp_path / "vllm_serving" / "experiments.json", [RUN]).parent.parent)
    assert found.rows == 2
    assert {metric: one.n for metric, one in found.overall.items()} == {
        "ttft_mean": 2, "ttft_p90": 2, "itl_mean": 2, "e2e_mean": 2, "kv_blocks": 1,
    }  # fmt: skip
    assert counts(found) == {vllm_serving.SUMMARY: 1}


def test_requests_repeat_prompts_and_keep_to_the_stages():
    table, stage_of = requests_of(Run.model_validate(RUN))
    assert np.bincount(stage_of).tolist() == [20, 40]
    assert set(table.prompt_tokens.tolist()) == {250}
    arrival_s = table.arrival_ticks / 1e12
    assert arrival_s[stage_of == 0].max() == pytest.approx(10.0)
    assert arrival_s.max() == pytest.approx(20.0)
    assert (np.diff(arrival_s) > 0).all()
    hashes = table.prefix_hashes
    assert len(set(hashes)) == 6
    assert hashes[0] == hashes[6]
    # Users of one system prompt share the chunks that lie wholly within it (3 of 16 tokens), and no more.
    assert hashes[0][:3] == hashes[3][:3]
    assert hashes[0][3:] != hashes[3][3:]
    assert hashes[0][:3] != hashes[1][:3]
    assert {len(one) for one in hashes} == {250 // 16}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "someone/else"}, vllm_serving.UNKNOWN_MODEL),
        ({"hardware": "Some GPU"}, vllm_serving.UNKNOWN_DEVICE),
        ({"workload": {"other_tool": {}}}, vllm_serving.OTHER_WORKLOAD),
        ({"tp": 3}, "cannot be deployed: IncompatibleScenario"),
    ],
)
def test_runs_that_cannot_be_expressed_are_named(run, tmp_path, change, reason):
    found = run("vllm-serving", write_json(tmp_path / "experiments.json", [RUN, RUN | change]))
    assert found.rows == 2
    assert counts(found)[reason] == 2


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "must be a list of runs"),
        ([], "runs"),
        ([{key: value for key, value in RUN.items() if key != "hardware"}], "hardware: required, but missing"),
        ([RUN | {"max_num_seqs": "many"}], "max_num_seqs"),
        ([RUN | {"measured_ms": {"stage_0": {"e2e_mean": "slow"}}}], "e2e_mean"),
    ],
)
def test_wrong_experiments(run, tmp_path, document, message):
    with pytest.raises(InvalidSpec, match=message):
        run("vllm-serving", write_json(tmp_path / "experiments.json", document))


def test_only_unknown_models_is_an_error(run, tmp_path):
    with pytest.raises(InvalidSpec, match="no run to score: model without a preset"):
        run("vllm-serving", write_json(tmp_path / "experiments.json", [RUN | {"model": "someone/else"}]))


# --- vllm-requests ---------------------------------------------------------------------------------------------------


def test_a_log_is_replayed(run, tmp_path):
    write_log(tmp_path / "vllm_requests" / "RTX4090" / "Llama-3.1-8B", log_rows())
    found = run("vllm-requests", tmp_path)
    assert found.rows == 120
    assert set(found.overall) == {
        "ttft_mean", "ttft_p90", "ttft_p99", "tpot_mean", "tpot_p90", "tpot_p99", "itl_mean", "e2e_mean", "e2e_p90",
        "e2e_p99", "kv_blocks",
    }  # fmt: skip
    assert "device=rtx-4090" in found.groups


def test_a_compressed_log_of_few_requests_has_no_p99(run, tmp_path):
    path = write_log(tmp_path, log_rows(20))
    (path.parent / "requests.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    found = run("vllm-requests", tmp_path)
    assert found.rows == 20
    assert not [metric for metric in found.overall if metric.endswith("p99")]


def test_unfinished_requests_are_counted(run, tmp_path):
    rows = log_rows(20)
    rows[3]["last_token_ts"] = None
    found = run("vllm-requests", write_log(tmp_path, rows))
    assert (found.rows, counts(found)) == (19, {vllm_requests.UNFINISHED: 1})


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], TraceError, "the file is empty"),
        ([{"request_id": "a"}], TraceError, "column 'queued_ts' is missing"),
        ([log_rows(1)[0] | {"first_token_ts": 1.0}], TraceError, "times must rise"),
        ([log_rows(1)[0] | {"input_toks": "many"}], TraceError, "input_toks"),
    ],
)
def test_wrong_logs(run, tmp_path, rows, error, message):
    with pytest.raises(error, match=message):
        run("vllm-requests", write_log(tmp_path, rows))


def test_a_log_without_its_engine_options(run, tmp_path):
    path = write_log(tmp_path, log_rows(2))
    (path.parent / "meta.json").unlink()
    with pytest.raises(InvalidSpec, match=r"meta.json: no such file"):
        run("vllm-requests", path)


def test_a_log_of_an_unknown_model(run, tmp_path):
    with pytest.raises(InvalidSpec, match="no log to score: model without a preset"):
        run("vllm-requests", write_log(tmp_path, log_rows(2), META | {"model": "someone/else"}))


# --- kv-quant --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "load"),
    [
        ("random 512->128, 1500 prompts, conc 80", Load(512, 128, 80, 1500)),
        ("ISL128 OSL512 N200 C32", Load(128, 512, 32, 200)),
        ("1k/1k conc 128", Load(1024, 1024, 128, 512)),
        ("150 req, conc 8, ~20k in/2k out", Load(20480, 2048, 8, 150)),
        ("decode 32->256", None),
        ("ShareGPT mixed", None),
        ("-", None),
        ("serving", None),
    ],
)
def test_workloads_of_tables(text, load):
    assert read_load(text) == load


def test_ratios_are_taken_within_equal_rows(run, tmp_path):
    rows = [
        KV_QUANT, KV_QUANT | {"kv_scheme": "fp8", "value": 130.0},
        KV_QUANT | {"metric": "kv capacity", "value": 400.0},
        KV_QUANT | {"metric": "kv capacity", "value": 800.0, "kv_scheme": "fp8"},
    ]  # fmt: skip
    found = run("kv-quant", write_csv(tmp_path / "kv.csv", rows))
    assert found.rows == 2
    assert (found.overall["ratio"].n, found.overall["direction"].n) == (2, 1)
    assert found.groups["quantity=capacity"]["ratio"].median_ape < 0.01
    assert counts(found) == {kv_quant.BASE_ROW: 2}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kv_scheme": "fp8 model + fp8kv"}, kv_quant.WEIGHTS_TOO),
        ({"kv_scheme": "QServe-W4A8KV4"}, kv_quant.WEIGHTS_TOO),
        ({"kv_scheme": "tq4"}, kv_quant.UNKNOWN_SCHEME),
        ({"workload": "ShareGPT"}, kv_quant.UNKNOWN_WORKLOAD),
        ({"metric": "smiles"}, kv_quant.UNKNOWN_METRIC),
        ({"gpu": "not stated"}, kv_quant.UNKNOWN_DEVICE),
        ({"model": "someone/else"}, kv_quant.UNKNOWN_MODEL),
        ({"value": "OOM"}, kv_quant.NO_FIGURE),
        ({"metric": "duration"}, kv_quant.NO_BASE),
    ],
)
def test_schemes_that_cannot_be_expressed_are_named(run, tmp_path, change, reason):
    shared = {
        name: value
        for name, value in change.items()
        if reason != kv_quant.NO_BASE and name not in ("kv_scheme", "value")
    }
    rows = [KV_QUANT | shared, KV_QUANT | {"kv_scheme": "fp8"} | change]
    found = run("kv-quant", write_csv(tmp_path / "kv.csv", rows))
    assert (found.rows, counts(found)) == (0, {kv_quant.BASE_ROW: 1, reason: 1})


def test_a_difference_within_noise_has_no_direction(run, tmp_path):
    rows = [KV_QUANT, KV_QUANT | {"kv_scheme": "fp8", "value": 101.0}]
    found = run("kv-quant", write_csv(tmp_path / "kv.csv", rows))
    assert set(found.overall) == {"ratio"}
    assert counts(found)[kv_quant.NO_DIFFERENCE] == 1


# --- edge ------------------------------------------------------------------------------------------------------------


def test_every_edge_table_is_read(run, tmp_path):
    folder = tmp_path / "edge"
    write_csv(folder / "apple.csv", [APPLE, APPLE | {"chip": "M2 Pro", "bw_gb_s": 150}])
    write_csv(folder / "board.csv", [
        {"gpu": "RTX 4090", "backend": "CUDA", "pp512": 11992.7, "tg128": 186.2, "model": "Llama 2 7B Q4_0"},
        {"gpu": "RTX 5070 Ti", "backend": "CUDA", "pp512": 6952.4, "tg128": 176.9, "model": "Llama 2 7B Q4_0"},
    ])  # fmt: skip
    write_csv(folder / "depth.csv", [
        {"model": "gpt-oss-20b MXFP4", "size_gib": 11.3, "depth": 4096, "pp2048_t_s": 3030.3, "tg32_t_s": 77.4,
         "device": "NVIDIA GB10 (DGX Spark, 273 GB/s LPDDR5X)", "source": "made up"},
    ])  # fmt: skip
    write_csv(folder / "batched.csv", [
        {"pp": 512, "batch": 8, "s_pp_t_s": 2356.9, "s_tg_t_s": 195.7, "model": "Qwen2.5-Coder-7B Q8_0",
         "device": "NVIDIA GB10 (DGX Spark)", "source": "made up"},
    ])  # fmt: skip
    write_csv(folder / "phone.csv", [
        {"device": "OnePlus 12", "soc": "Snapdragon 8 Gen 3", "runtime": "ExecuTorch", "backend": "CPU",
         "model": "Llama 3.2 1B", "quant": "BF16", "prefill_tok_s": 60.3, "decode_tok_s": 19.2, "source": "made up"},
    ])  # fmt: skip
    write_csv(folder / "bandwidth.csv", [{"soc": "Strix Halo", "measured_gb_s": 212, "theoretical_gb_s": 256}])
    found = run("edge", tmp_path)
    assert found.rows == 5
    assert found.overall["decode_tok_s"].n == 6
    assert counts(found) == {
        edge.NOT_RATES: 1, edge.UNKNOWN_DEVICE: 2, edge.OTHER_BANDWIDTH: 4, edge.NO_FIGURE: 4,
    }  # fmt: skip
    assert {"device=gb10", "device=snapdragon-8-gen-3", "weights=unpacked", "runtime=llama.cpp CUDA"} <= set(
        found.groups
    )


def test_a_longer_context_is_not_predicted_to_decode_faster(run, tmp_path):
    row = {"model": "gpt-oss-20b MXFP4", "depth": 0, "pp2048_t_s": 1000, "tg32_t_s": 50, "device": "GB10", "source": ""}
    short = run("edge", write_csv(tmp_path / "a.csv", [row])).overall["decode_tok_s"].bias
    long = run("edge", write_csv(tmp_path / "b.csv", [row | {"depth": 32768}])).overall["decode_tok_s"].bias
    assert long < short


@pytest.mark.parametrize("weights", ["IQ1_S", "Q4_K_M", "Q4_0_4_4", ""])
def test_an_unknown_weight_format_is_named(run, tmp_path, weights):
    row = {"gpu": "RTX 4090", "backend": "CUDA", "pp512": 1.0, "tg128": 1.0, "model": f"Llama 2 7B {weights}"}
    found = run("edge", write_csv(tmp_path / "board.csv", [row]))
    assert counts(found) == {edge.UNKNOWN_WEIGHTS: 2}


# --- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suite", "rows"), [("vllm-serving", 10), ("vllm-requests", 300), ("kv-quant", 20), ("edge", 40)]
)
def test_shared_data_is_scored(run, shared_data, suite, rows):
    found = run(suite, shared_data)
    assert found.rows >= rows
    assert all(one.n for one in found.overall.values())
