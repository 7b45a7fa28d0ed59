"""``kvsim limit`` and ``kvsim list strategies`` as a person calls them."""

from __future__ import annotations

import csv
import json

import pytest

from kvsim import kernel_catalog
from kvsim.compression import STRATEGIES, parse_compression
from kvsim.errors import UnknownName
from kvsim.limit import EncodingPoint, token_id_tier
from kvsim.limit.token_ids import prefill_flops
from kvsim.model_catalog import load_model
from kvsim.strategy_table import families, kernels_of, strategy_table

SMALL = ("--ensemble", "llama-like(num_layers=2,num_tokens=256,head_dim=64,num_topics=2,num_needles=1)")
LLAMA = "llama-3.1-8b"


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in strategy_table(LLAMA, "h100-sxm", 8192)}


# --- limit -----------------------------------------------------------------------------------------------------------


def test_the_table_names_limits_gaps_and_the_tier_apart(invoke):
    result = invoke("limit", *SMALL, "-s", "native,fp8,snapkv")
    assert result.exit_code == 0, result.stderr
    for words in ("4^-R, isotropic", "covariance, head", "judge by", "lossless", "snapkv has no point", "Apart from",
                  "2604.15356", "prefill of"):  # fmt: skip
        assert words in result.stdout
    assert "covariances are estimated" in result.stderr


def test_json_and_csv_hold_the_same_points(invoke, tmp_path):
    path = tmp_path / "limit.csv"
    result = invoke("limit", *SMALL, "-s", "fp8,snapkv", "--json", "--csv", path)
    answer = json.loads(result.stdout)
    (point,) = answer["points"]
    with path.open(encoding="utf-8", newline="") as stream:
        written = list(csv.DictReader(stream))
    assert list(written[0]) == [*EncodingPoint.model_fields, "reason"]
    assert float(written[0]["relative_mse"]) == point["relative_mse"]
    assert written[1]["strategy"] == "snapkv"
    assert "drops or skips" in written[1]["reason"]
    assert answer["token_ids"]["fold"] == 32_768


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--kv", "x.safetensors", "--ensemble", "llama-like"), "exclude each other"),
        (("--calibrate", "x.safetensors"), "goes with --kv"),
        (("--kv", "x.safetensors", "--calibrate", "x.safetensors"), "nothing may be calibrated on it"),
        (("--ensemble", "lama-like"), "llama-like"),
        ((*SMALL, "-s", "fp9"), "fp8"),
        ((*SMALL, "--csv", "x.parquet"), "must end in .csv"),
        ((*SMALL, "-s", "fp8", "--context", "1000000"), "1000000"),
    ],
)
def test_wrong_input_ends_with_status_2_and_says_what_is_allowed(invoke, arguments, words):
    result = invoke("limit", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_token_ids_of_llama() -> None:
    tier = token_id_tier(LLAMA, "h100-sxm", 8192)
    assert tier.bits_per_value == 32 / (2 * 32 * 8 * 128)
    assert tier.prefill_s.low <= tier.prefill_s.value <= tier.prefill_s.high
    assert 0.2 < tier.prefill_flops / (tier.prefill_s.value * 989e12) < 1.0, "less than the device's peak"
    assert token_id_tier(LLAMA, "h100-sxm", 16_384).prefill_s.value > 2 * tier.prefill_s.value


def test_prefill_flops_are_weights_and_attention() -> None:
    model = load_model(LLAMA)
    linear = 2 * (8.03e9 - 2 * 128_256 * 4096)
    assert prefill_flops(model, 1) == pytest.approx(linear + 2 * 4096 * 128_256 + 32 * 2 * 32 * 256, rel=0.01)
    pairs = 8192 * 8193 / 2
    assert prefill_flops(model, 8192) == pytest.approx(8192 * linear + 32 * 2 * 32 * 256 * pairs, rel=0.01)


# --- list strategies -------------------------------------------------------------------------------------------------


def test_every_strategy_is_listed_with_all_that_is_known(rows):
    assert tuple(rows) == STRATEGIES
    for row in rows.values():
        assert row.family
        assert row.description
        assert (row.cannot_run is None) == (row.bytes_per_token is not None)
        is_read = parse_compression(row.name).refused_in_pool is None
        assert (row.decode_basis is not None) == (row.cannot_run is None and is_read)
        assert (row.risk.why_not_on_tensors is None) == row.risk.tensors


@pytest.mark.parametrize(
    ("name", "per_token", "bits"),
    [
        ("native", 131_072, 16.0), ("fp8", 65_536, 8.0), ("int8_per_token_head", 67_584, 8.25),
        ("int4_per_token_head", 34_816, 4.25), ("nvfp4", 36_864, 4.5), ("kivi-4", 40_960, 5.0),
        ("kivi-2", 24_576, 3.0), ("snapkv", 131_072, 16.0),
    ],
)  # fmt: skip
def test_bytes_are_the_published_ones(rows, name, per_token, bits):
    assert rows[name].bytes_per_token == per_token
    assert rows[name].bits_per_value == bits


def test_folds_count_windows_and_kept_tokens(rows):
    assert rows["snapkv"].fold == pytest.approx(2.0)
    assert rows["snapkv+fp8"].fold == pytest.approx(4.0)
    assert rows["kivi-2"].fold == pytest.approx(8192 * 16 / (8064 * 3 + 128 * 16))
    assert rows["quest"].fold < 1


def test_kernels_are_of_this_format_alone():
    assert set(kernels_of(parse_compression("fp8_e5m2"))) == {
        kernel.variant for kernel in kernel_catalog.load_compiled_kernels()
        if kernel.operation in ("append", "decode_attention") and kernel.kv_format == "fp8_e5m2"
    }  # fmt: skip
    assert "score/snapkv/native/best" in set(kernels_of(parse_compression("snapkv")))
    assert not any("mla" in name for name in kernels_of(parse_compression("native")))
    assert all("mla" in name for name in kernels_of(parse_compression("native"), is_latent=True))
    assert "decode_attention/turboquant_mse_3/best" in set(kernels_of(parse_compression("turboquant_mse:3")))


def test_prices_say_what_they_rest_on(rows):
    assert rows["native"].decode_basis == rows["fp8"].decode_basis == "fitted"
    assert rows["kivi-2"].decode_basis == "literature"
    assert strategy_table(LLAMA, "l40s", 8192, names=["kivi-2"])[0].device == "l40s"


def test_a_model_that_cannot_run_it_gets_the_reason_and_no_number():
    (row,) = strategy_table("deepseek-v3", "h200-sxm", 8192, names=["kivi-2"])
    assert row.bytes_per_token is row.fold is row.decode_basis is None
    assert "MLA" in row.cannot_run


def test_families_filter_and_unknown_ones_are_suggested(invoke):
    entries = json.loads(invoke("list", "strategies", "--family", "rotation", "--json").stdout)
    assert {entry["name"] for entry in entries} >= {"turboquant_4bit_nc"}
    assert all("rotation" in entry["family"] for entry in entries)
    assert set(families()) >= {"quantisation", "rotation", "low rank", "eviction", "sparse reading"}
    with pytest.raises(UnknownName, match="rotation"):
        strategy_table(LLAMA, "h100-sxm", 8192, "rotatoin")


def test_narrow_and_wide_terminals_get_what_fits(invoke, monkeypatch):
    from kvsim.cli import console, strategies

    for width, has_description in ((80, False), (180, True)):
        monkeypatch.setattr(strategies, "stdout_width", lambda width=width: width)
        monkeypatch.setattr(console, "stdout_width", lambda width=width: width)
        shown = invoke("list", "strategies").stdout
        assert max(map(len, shown.splitlines())) <= width
        assert ("2402.02750" in shown) == has_description
    assert "kernels: append/kivi-2/best" in invoke("list", "strategies", "--family", "quantisation", "-v").stdout
