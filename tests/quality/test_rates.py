"""Priced shares of data-dependent coding against caches that nobody fitted them to."""

from __future__ import annotations

import pytest

from kvsim.compression import CODINGS, parse_compression
from kvsim.compression.codec import fixed_width_bits
from kvsim.compression.rates import load_coders, load_rates
from kvsim.compression.spelling import spell_part
from kvsim.quality.store import fit_strategy, store_cache
from kvsim.tensors import KvTensors
from kvsim.tensors.ensemble import PRESETS, draw, preset

CODECS = ("lossless", "cachegen", "kvtc", "kvtc:16", "kvtc:32")
OTHER_SEED = 77
"""tools/write_kv_rates.py measures seeds 0 and 1."""


@pytest.fixture(scope="module", params=["llama-like", "heavy-keys"])
def cache(request: pytest.FixtureRequest) -> tuple[KvTensors, tuple[KvTensors, ...]]:
    spec = preset(request.param, num_queries=8, num_prompt_queries=8)
    return draw(spec, OTHER_SEED), tuple(draw(spec, OTHER_SEED, sequence=one) for one in (1, 2, 3))


@pytest.mark.parametrize("name", CODECS)
def test_whole_codecs_stay_within_their_band(name: str, cache: tuple[KvTensors, tuple[KvTensors, ...]]) -> None:
    kv, samples = cache
    compression = parse_compression(name)
    stored = store_cache(fit_strategy(compression, samples), kv)
    rate, exempt = compression.stored.rate, compression.encoding.native_tokens
    assert rate is not None
    elements = sum((layer.keys.size + layer.values.size) // layer.num_tokens for layer in kv.layers)
    coded = stored.total_bits - 16 * elements * exempt
    share = coded / (16 * elements * (kv.layers[0].num_tokens - exempt))
    assert rate.low <= share <= rate.high


@pytest.mark.parametrize("encoding", ["int4_per_token_head", "kivi-2", "int8_per_token_head"])
def test_codings_stay_within_their_band(encoding: str, cache: tuple[KvTensors, tuple[KvTensors, ...]]) -> None:
    kv, samples = cache
    layer = parse_compression(encoding).encoding.codec().fit(samples).store(kv)[0]
    plain = sum(fixed_width_bits(one) for one in layer.symbols)
    for kind in ("huffman", "rans", "deflate", "zstd"):
        compression = parse_compression(f"{encoding}+{kind}")
        rate, coder = compression.stored.rate, compression.coding.coder()
        assert rate is not None
        share = sum(coder.coded_bits(one) for one in layer.symbols) / plain
        # The band spans two seeds of each ensemble; another seed may lie a little beside it.
        assert rate.low - 0.01 <= share <= rate.high + 0.01, kind


def test_every_pair_that_composes_has_a_measured_share() -> None:
    rates = load_rates()
    assert set(rates.codecs) == set(CODECS)
    assert set(rates.codecs) == set(load_coders().coders)
    kinds = {spell_part(part()) for part in CODINGS if part().kind != "fixed_width"}
    for shares in rates.codings.values():
        assert kinds < set(shares)
        for share in shares.values():
            assert 0 < share.low <= share.value <= share.high <= 1.01


def test_priced_bytes_take_the_share_of_codes_and_leave_metadata() -> None:
    from kvsim.specs.base import Dtype
    from kvsim.specs.model import LayerGroup, LayerKind

    group = LayerGroup(kind=LayerKind.FULL, layers=(0,), num_kv_heads=8, k_head_dim=128, v_head_dim=128)
    plain = parse_compression("int4_per_token_head").stored.bytes_per_token(group, Dtype.BF16)
    coded = parse_compression("int4_per_token_head+huffman")
    rate, bytes_coded = coded.stored.rate, coded.stored.bytes_per_token(group, Dtype.BF16)
    assert rate is not None
    assert bytes_coded.payload_bytes == pytest.approx(plain.payload_bytes * rate.value)
    assert bytes_coded.metadata_bytes == plain.metadata_bytes
    assert coded.stored.read_bytes_per_token(group, Dtype.BF16) == bytes_coded.total_bytes
    at_rest = parse_compression("int4_per_token_head+rans").stored
    assert at_rest.read_bytes_per_token(group, Dtype.BF16) == plain.total_bytes


def test_parameters_that_were_not_measured_use_the_bare_name() -> None:
    given, bare = (parse_compression(f"kivi-2{more}+rans").stored.rate for more in ("(group_size=64)", ""))
    assert given == bare


def test_the_ensembles_of_the_file_exist() -> None:
    text = load_rates().source
    assert "synthetic" in text
    assert len(PRESETS) == 4
