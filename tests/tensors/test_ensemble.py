"""Ensembles keep what they promise, each statistic measured on what is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from kvsim.errors import InvalidSpec, UnknownName
from kvsim.tensors import KvTensors, attend
from kvsim.tensors.ensemble import PRESETS, EnsembleSpec, draw, parse_ensemble, preset
from kvsim.tensors.ensemble.heads import draw_heads
from kvsim.tensors.statistics import effective_tokens, kurtosis, rank_exponent, spectrum_exponent

NAMES = tuple(PRESETS)


@pytest.fixture(scope="module")
def drawn() -> dict[str, KvTensors]:
    return {name: draw(preset(name), 0) for name in NAMES}


def _heads(spec: EnsembleSpec, *, retrieving: bool) -> list[tuple[int, int]]:
    models = draw_heads(spec, 0)
    return [
        (layer, head)
        for layer in range(spec.num_layers)
        for head in range(spec.num_kv_heads)
        if models[layer][head].retrieves == retrieving
    ]


def _weights(kv: KvTensors, spec: EnsembleSpec, layer: int, head: int) -> np.ndarray:
    found = attend(kv.layers[layer], kv.attention_scale).weights
    return found[head * spec.group_size : (head + 1) * spec.group_size].astype(np.float64)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_elements_of_bf16(drawn: dict[str, KvTensors], name: str) -> None:
    spec, kv = preset(name), drawn[name]
    layer = kv.layers[-1]
    assert kv.num_layers == spec.num_layers
    assert layer.keys.shape == layer.values.shape == (spec.num_kv_heads, spec.num_tokens, spec.head_dim)
    assert layer.queries.shape == (spec.num_kv_heads * spec.group_size, spec.num_queries, spec.head_dim)
    assert layer.prompt_queries.shape[1] == spec.num_prompt_queries
    for array in (layer.keys, layer.values, layer.queries, layer.prompt_queries):
        assert not (array.view(np.uint32) & 0xFFFF).any()
        assert np.isfinite(array).all()


def test_the_seed_is_the_model_and_the_sequence_the_text() -> None:
    spec = preset("llama-like", num_tokens=128, num_layers=1)
    first, again, other = (draw(spec, 5, sequence=k) for k in (0, 0, 1))
    assert np.array_equal(first.layers[0].keys, again.layers[0].keys)
    assert not np.array_equal(first.layers[0].keys, other.layers[0].keys)
    scales = [np.abs(kv.layers[0].keys[0]).mean(axis=0) for kv in (first, other, draw(spec, 6))]
    same, different = (np.corrcoef(scales[0], scales[k])[0, 1] for k in (1, 2))
    assert same > 0.95
    assert different < 0.5


@pytest.mark.parametrize("name", NAMES)
def test_sinks_have_their_mass(drawn: dict[str, KvTensors], name: str) -> None:
    spec, kv = preset(name), drawn[name]
    mass = [attend(layer, kv.attention_scale).weights[..., : spec.num_sinks].sum(axis=-1).mean() for layer in kv.layers]
    assert np.mean(mass) == pytest.approx(spec.sink_mass, abs=0.01)


@pytest.mark.parametrize("name", ["llama-like", "heavy-keys", "retrieval"])
def test_retrieval_heads_look_at_their_needle(drawn: dict[str, KvTensors], name: str) -> None:
    spec, kv = preset(name), drawn[name]
    heads = _heads(spec, retrieving=True)
    assert len(heads) == round(spec.retrieval_heads * spec.num_layers * spec.num_kv_heads)
    times = np.arange(spec.num_queries)
    sought = np.array(kv.needles)[(spec.num_prompt_queries + times) % spec.num_needles]
    for layer, head in heads:
        weights = _weights(kv, spec, layer, head)
        share = weights[:, times, sought] / (1 - weights[..., : spec.num_sinks].sum(axis=-1))
        assert share.mean() == pytest.approx(spec.needle_mass, abs=0.01)
    others = [
        _weights(kv, spec, layer, head)[:, times, sought].mean() for layer, head in _heads(spec, retrieving=False)
    ]
    assert np.mean(others) < 0.02


@pytest.mark.parametrize(("name", "n_eff"), [("llama-like", (8, 60)), ("heavy-keys", (8, 60)), ("diffuse", (350, 700))])
def test_attention_falls_with_rank_as_a_power(
    drawn: dict[str, KvTensors], name: str, n_eff: tuple[float, float]
) -> None:
    """Recency and noise flatten or steepen the law by up to a tenth of it."""
    spec, kv = preset(name), drawn[name]
    exponents, spreads = [], []
    for layer, head in _heads(spec, retrieving=False):
        weights = _weights(kv, spec, layer, head)[..., spec.num_sinks :]
        exponents.append(rank_exponent(weights))
        spreads.append(np.median(effective_tokens(weights / weights.sum(axis=-1, keepdims=True))))
    assert np.mean(exponents) == pytest.approx(spec.attention_exponent, rel=0.12)
    assert n_eff[0] < np.mean(spreads) < n_eff[1]


@pytest.mark.parametrize("name", ["llama-like", "diffuse"])
def test_attention_falls_with_distance_as_a_power(drawn: dict[str, KvTensors], name: str) -> None:
    """RoPE's pairs are discrete, so the law has ripples; its slope is within a quarter."""
    spec, kv = preset(name), drawn[name]
    distance = spec.num_tokens - np.arange(spec.num_sinks, spec.num_tokens)
    logits = [attend(layer, kv.attention_scale).logits[:, 0, spec.num_sinks :] for layer in kv.layers]
    slope = np.polyfit(np.log(distance), np.concatenate(logits).mean(axis=0), 1)[0]
    assert -slope == pytest.approx(spec.recency_exponent, rel=0.25)


@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_heavy_channels_make_heavy_tails(scale: float) -> None:
    """Without a mean, kurtosis is that of a mixture; bases share variance unevenly, which adds up to a third."""
    spec = preset(
        "llama-like", heavy_channel_scale=scale, key_mean=0.0, key_spectrum_exponent=0.0, num_layers=2, num_sinks=0
    )
    kv = draw(spec, 1)
    share = 2 * spec.heavy_pairs / spec.head_dim
    promised = 3 * (1 - share + share * scale**4) / (1 - share + share * scale**2) ** 2
    measured = np.mean([kurtosis(layer.keys) for layer in kv.layers])
    assert measured == pytest.approx(promised, rel=0.15)


def test_heavy_keys_are_heavier_than_the_rest(drawn: dict[str, KvTensors]) -> None:
    mean = {name: np.mean([kurtosis(layer.keys) for layer in kv.layers]) for name, kv in drawn.items()}
    assert mean["heavy-keys"] > 25
    assert max(value for name, value in mean.items() if name != "heavy-keys") < 20
    assert np.mean([kurtosis(layer.values) for layer in drawn["llama-like"].layers]) < 5


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_spectra_are_power_laws(exponent: float) -> None:
    spec = preset(
        "llama-like", key_spectrum_exponent=exponent, value_spectrum_exponent=exponent, heavy_channel_scale=1.0,
        num_layers=1, num_tokens=4096, num_sinks=0,
    )  # fmt: skip
    kv = draw(spec, 2)
    assert kv.rope is not None
    layer = kv.layers[0]
    assert spectrum_exponent(layer.values[0]) == pytest.approx(exponent, rel=0.1)
    assert spectrum_exponent(kv.rope.undo(layer.keys, layer.positions)[0]) == pytest.approx(exponent, rel=0.1)


def test_keys_before_rope_are_stationary(drawn: dict[str, KvTensors]) -> None:
    kv = drawn["llama-like"]
    assert kv.rope is not None
    layer = kv.layers[0]
    plain = kv.rope.undo(layer.keys, layer.positions)[:, 4:]
    early, late = plain[:, :500].mean(axis=1), plain[:, -500:].mean(axis=1)
    turned = layer.keys[:, 4:504].mean(axis=1) - layer.keys[:, -500:].mean(axis=1)
    assert np.abs(early - late).mean() < 0.15 * np.abs(plain).mean()
    assert np.abs(turned).mean() > 0.15 * np.abs(plain).mean()


def test_neighbouring_tokens_and_layers_are_correlated(drawn: dict[str, KvTensors]) -> None:
    spec, kv = preset("llama-like"), drawn["llama-like"]
    heads = draw_heads(spec, 0)
    latent = [
        (kv.layers[index].values[0, 4:] - heads[index][0].value_mean) @ heads[index][0].value_basis for index in (1, 2)
    ]
    between_layers = np.mean([np.corrcoef(latent[0][:, c], latent[1][:, c])[0, 1] for c in range(spec.head_dim)])
    between_tokens = np.mean([np.corrcoef(latent[0][1:, c], latent[0][:-1, c])[0, 1] for c in range(spec.head_dim)])
    assert between_layers == pytest.approx(spec.layer_correlation, abs=0.03)
    assert between_tokens == pytest.approx(spec.token_correlation, abs=0.03)


def test_sink_values_are_small(drawn: dict[str, KvTensors]) -> None:
    norms = np.linalg.norm(drawn["llama-like"].layers[0].values, axis=-1)
    assert norms[:, :4].mean() == pytest.approx(0.1 * norms[:, 4:].mean(), rel=0.3)


def test_a_visible_question_is_asked_within_the_prompt() -> None:
    for visible, mass in ((False, 0.0), (True, 0.4)):
        kv = draw(preset("retrieval", question_visible=visible, num_layers=1, retrieval_heads=1.0), 0)
        layer = kv.layers[0]
        logits = kv.attention_scale * layer.prompt_queries[0, -1].astype(np.float64) @ layer.keys[0].T
        weights = np.exp(logits - logits.max())
        assert weights[list(kv.needles)].sum() / weights.sum() == pytest.approx(mass, abs=0.17)


def test_queries_from_the_first_token_on_stay_in_bounds() -> None:
    kv = draw(preset("retrieval", num_tokens=64, num_needles=2, num_layers=1), 0)
    norms = np.linalg.norm(kv.layers[0].prompt_queries, axis=-1)
    assert kv.layers[0].prompt_queries.shape[1] == 64
    assert norms.max() < 5 * np.median(norms)


def test_the_command_lines_spelling() -> None:
    assert parse_ensemble("llama-like") == (PRESETS["llama-like"], 0)
    spec, seed = parse_ensemble("diffuse(num_tokens=2048, num_layers=2):7")
    assert (spec.num_tokens, spec.num_layers, seed) == (2048, 2, 7)
    for wrong in ("llama-like:x", "llama-like(num_tokens)", "llama-like(num_tokens=1,num_tokens=2)"):
        with pytest.raises(InvalidSpec, match="llama-like"):
            parse_ensemble(wrong)
    with pytest.raises(UnknownName, match="did you mean 'llama-like'"):
        parse_ensemble("lama-like")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="raise rope_theta"):
        preset("llama-like", rope_theta=1e4, head_dim=64)
    with pytest.raises(InvalidSpec, match="num_tokens"):
        preset("llama-like", num_needles=20, num_tokens=64, num_topics=2)
    with pytest.raises(InvalidSpec, match="num_prompt_queries"):
        preset("llama-like", num_prompt_queries=2000)
    with pytest.raises(InvalidSpec, match="sinkmass"):
        preset("llama-like", sinkmass=0.2)
