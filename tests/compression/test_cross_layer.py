"""What methods over several layers, and channel pruning, cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvsim.compression import Compression, parse_compression, stored_bytes
from kvsim.compression.base import LayerView
from kvsim.compression.reduction.minicache import MiniCache
from kvsim.compression.reduction.none import NoReduction
from kvsim.compression.reduction.shared_layers import KvSharer
from kvsim.errors import InvalidSpec, NotRunnable
from kvsim.scenario_file import load_scenario
from kvsim.simulate import estimate
from kvsim.specs.base import Dtype
from kvsim.specs.device import DeviceSpec
from kvsim.specs.model import LayerGroup, LayerKind, ModelSpec

CHECKOUT = Path(__file__).resolve().parents[2]
FULL_TOKEN = 2 * 8 * 128 * 2
"""Bytes of one token in one layer of Llama-3.1-8B."""


def _bytes_per_token(name: str, model: ModelSpec) -> float:
    return (
        stored_bytes(parse_compression(name), model, 3000, 0) - stored_bytes(parse_compression(name), model, 1000, 0)
    ) / 2000


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # 51 of 128 key channels left out: (77 + 128) / 256 of 131,072.
        ("think", 131_072 * 205 / 256),
        ("think:0.5", 131_072 * 3 / 4),
        # 16 layers whole, 8 pairs: one layer of directions, 4 fp16 lengths and 2 bits per head, 5 % apart.
        ("minicache", 16 * FULL_TOKEN + 8 * (FULL_TOKEN + 8 * 4 * 2 + 8 * 2 / 8 + 0.05 * FULL_TOKEN)),
        ("minicache(retained_fraction=0)", 24 * FULL_TOKEN + 8 * (8 * 4 * 2 + 8 * 2 / 8)),
        ("minicache(start_fraction=0,retained_fraction=0)", 16 * (FULL_TOKEN + 8 * 4 * 2 + 8 * 2 / 8)),
        # int4 in 68 B per vector; what stays apart stays in bf16.
        ("minicache+int4_per_token_head", 24 * 1088 + 8 * (8 * 4 * 2 + 8 * 2 / 8 + 0.05 * FULL_TOKEN)),
        ("kvsharer", 22 * FULL_TOKEN), ("kvsharer:0.5", 16 * FULL_TOKEN),
        ("cla-2", 16 * FULL_TOKEN), ("cla-3", 11 * FULL_TOKEN), ("cla-2+fp8", 16 * FULL_TOKEN / 2),
    ],
)  # fmt: skip
def test_bytes_per_token_of_llama_8b(name: str, expected: float, models: dict[str, ModelSpec]) -> None:
    assert _bytes_per_token(name, models["llama-3.1-8b"]) == pytest.approx(expected, rel=1e-12)


def test_think_holds_a_mask_per_head_and_sequence(models: dict[str, ModelSpec]) -> None:
    model = models["llama-3.1-8b"]
    mask = stored_bytes(parse_compression("think"), model, 1, 0) - 131_072 * 205 / 256
    assert mask == 32 * 8 * 128 / 8


@pytest.mark.parametrize("factor", [2, 3])
def test_a_model_built_with_cla_and_cla_on_a_plain_one_hold_the_same(factor: int, models: dict[str, ModelSpec]) -> None:
    plain = models["llama-3.1-8b"]
    shape = plain.groups[0]
    holders = tuple(range(0, 32, factor))
    readers = tuple(index for index in range(32) if index not in holders)
    built = plain.model_copy(
        update={
            "groups": (
                shape.model_copy(update={"layers": holders}),
                shape.model_copy(update={"layers": readers, "shares_kv": True}),
            )
        }
    )
    assert stored_bytes(Compression(), built, 4096, 100) == stored_bytes(
        parse_compression(f"cla-{factor}"), plain, 4096, 100
    )


@pytest.mark.parametrize("name", ["minicache", "cla-2", "cla-3", "kvsharer", "cla-2+fp8", "minicache+kivi-4"])
def test_every_layer_still_reads_a_whole_cache(name: str, models: dict[str, ModelSpec]) -> None:
    model = models["llama-3.1-8b"]
    compression = parse_compression(name)
    alone = compression.encoding.read_bytes_per_token(model.groups[0], Dtype.BF16)
    for index in range(32):
        encoding = compression.encoding_for_layer(index, model)
        assert encoding.read_bytes_per_token(model.groups[0], Dtype.BF16) >= alone


def test_residual_windows_are_shared_where_caches_are(models: dict[str, ModelSpec]) -> None:
    model = models["llama-3.1-8b"]
    window = stored_bytes(parse_compression("kivi-4"), model, 128, 0)
    assert stored_bytes(parse_compression("cla-2+kivi-4"), model, 128, 0) == window / 2
    assert stored_bytes(parse_compression("kvsharer+kivi-4"), model, 128, 0) == window * 22 / 32
    # MiniCache merges a token when it leaves the window.
    assert stored_bytes(parse_compression("minicache+kivi-4"), model, 128, 0) == window


def test_minicache_merges_the_deeper_half_in_pairs(models: dict[str, ModelSpec]) -> None:
    method = MiniCache()
    assert method.pairs(tuple(range(7)), 7) == ((3, 4), (5, 6))
    assert method.pairs(tuple(range(6)), 6) == ((3, 4),)
    # Sliding and full layers alternate: each kind is merged within itself.
    sliding = models["sliding"]
    full = next(group for group in sliding.groups if group.kind is LayerKind.FULL)
    assert method.pairs(full.layers, 12) == ((7, 9),)
    assert method.at_layer(LayerView(0, 7, _group(7))) == NoReduction()


def test_merging_is_paid_by_the_second_layer_of_a_pair(models: dict[str, ModelSpec]) -> None:
    model = models["llama-3.1-8b"]
    compression = parse_compression("minicache+int8_per_token_head")
    first, second = (compression.encoding_for_layer(index, model) for index in (16, 17))
    assert [call.name for call in first.append_ops(model.groups[0], model)] == ["quantize_kv"]
    assert [call.name for call in second.append_ops(model.groups[0], model)] == ["merge_directions"]
    assert [call.name for call in second.prefill_ops(1000, model.groups[0], model)] == ["retain_tokens"]
    assert tuple(first.prefill_ops(1000, model.groups[0], model)) == ()


def test_layers_without_a_cache_encode_nothing(models: dict[str, ModelSpec]) -> None:
    model = models["llama-3.1-8b"]
    reader = parse_compression("cla-2+fp8").encoding_for_layer(1, model)
    assert tuple(reader.append_ops(model.groups[0], model)) == ()
    assert reader.unpack_family == "fp8"


def test_think_scores_once_and_gathers_always(models: dict[str, ModelSpec]) -> None:
    model = models["llama-3.1-8b"]
    stored = parse_compression("think").stored
    (score,) = stored.prefill_ops(4096, model.groups[0], model)
    assert score.work.bytes_read == (4096 * 8 + 32 * 32) * 128 * 2
    (gather,) = stored.append_ops(model.groups[0], model)
    assert (gather.work.bytes_read, gather.work.bytes_written) == (8 * 128 * 2, 8 * 77 * 2)
    (query,) = stored.decode_ops(model.groups[0], model)
    assert query.work.bytes_read == 32 * 128 * 2


def test_kvsharer_shares_at_most_half_of_a_group() -> None:
    assert [KvSharer(sharing_fraction=0.5).sharing_layers(count) for count in (1, 2, 3, 6, 7)] == [0, 1, 1, 3, 3]
    assert KvSharer().sharing_layers(32) == 10


def test_cla_has_a_price_and_no_algorithm() -> None:
    with pytest.raises(NotRunnable, match="cla-2: layers that share keys and values must be trained"):
        parse_compression("cla-2").reduction.codec()


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("ThinKPress", "think"), ("think:0.25", "think:0.25"), ("MiniCache", "minicache"), ("CLA-2", "cla-2"),
        ("kvsharer:0.25", "kvsharer:0.25"), ("cla-2(sharing_factor=4)", "cla-2(sharing_factor=4)"),
        ("int4_per_token_head+minicache", "minicache+int4_per_token_head"),
        ("minicache(retained_fraction=0.1)", "minicache(retained_fraction=0.1)"),
    ],
)  # fmt: skip
def test_spellings(written: str, canonical: str) -> None:
    assert parse_compression(written).name == canonical
    assert parse_compression(canonical) == parse_compression(written)


@pytest.mark.parametrize(
    ("written", "match"),
    [
        ("think:1", "less than 1"), ("kvsharer:0.6", "less than or equal to 0.5"),
        ("cla-2(sharing_factor=1)", "greater"),
        ("minicache(retained_fraction=2)", "less than or equal to 1"), ("minicache+cla-2", "2 reductions"),
        ("minicache:3", "takes no value"),
    ],
)  # fmt: skip
def test_wrong_parameters_say_what_is_allowed(written: str, match: str) -> None:
    with pytest.raises(InvalidSpec, match=match):
        parse_compression(written)


def test_models_that_cannot(models: dict[str, ModelSpec], fp8_device: DeviceSpec) -> None:
    for name in ("think", "minicache"):
        reason = parse_compression(name).check(models["mla"], fp8_device)
        assert reason is not None
        assert "MLA" in reason
    for name in ("cla-2", "kvsharer"):
        reason = parse_compression(name).check(models["shared"], fp8_device)
        assert reason is not None
        assert "do so already" in reason


def test_a_shape_that_only_the_reduction_makes_names_both(models: dict[str, ModelSpec], fp8_device: DeviceSpec) -> None:
    reason = parse_compression("think+turboquant_3bit_nc").check(models["llama-3.1-8b"], fp8_device)
    assert reason is not None
    assert reason.startswith("turboquant_3bit_nc cannot store what think leaves:")
    assert "power of two" in reason


LONG = (
    "workload={kind: synthetic, num_prompts: 8, input_len: {kind: constant, tokens: 60000}, "
    "output_len: {kind: constant, tokens: 64}, arrivals: {kind: burst}}"
)


@pytest.mark.parametrize(
    ("name", "fold", "slowest", "fastest"),
    # Decode at long context gains at most what it reads less.
    [
        ("cla-2", 2.0, 0.995, 1.0), ("cla-3", 32 / 11, 0.995, 1.0), ("kvsharer", 32 / 22, 0.995, 1.0),
        ("minicache", 1.306, 0.98, 1.0), ("think", 256 / 205, 1.1, 256 / 205),
    ],
)  # fmt: skip
def test_capacity_rises_and_decode_is_no_faster_than_its_bytes(
    name: str, fold: float, slowest: float, fastest: float
) -> None:
    scenario = load_scenario(CHECKOUT / "examples" / "azure-h100.yaml", [f"compression={name}", LONG])
    effects = estimate(scenario).effects
    assert effects is not None
    assert effects.capacity_gain.value == pytest.approx(fold, rel=0.01)
    gain = effects.decode_gain.value
    assert gain is not None
    # A layer without a kernel of its own moves its bytes at the fitted native kernel's rate, which is within 0.5 % of
    # that kernel's own price per token.
    assert slowest < gain <= fastest * 1.005


def _group(layers: int) -> LayerGroup:
    return LayerGroup(kind=LayerKind.FULL, layers=tuple(range(layers)), num_kv_heads=2, k_head_dim=64, v_head_dim=64)
