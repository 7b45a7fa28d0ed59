"""Response profiles, their spectrum, and ways to stand for a cache: theory against simulation."""

from __future__ import annotations

import numpy as np
import pytest

from kvsim.errors import InvalidSpec
from kvsim.numerics.weighted_atoms import Atoms, Compressor
from kvsim.quality.dropping import random_eviction_error
from kvsim.quality.risk.comparators import (
    Entries,
    heavy_hitters,
    pivoted_cholesky,
    random_eviction,
    squared_error,
    squared_output,
    uniform_sample,
)
from kvsim.quality.risk.compressibility import compressibility, head_view
from kvsim.quality.risk.influence import HeadView, Spectrum, spectrum
from kvsim.quality.risk.search import fewest
from kvsim.quality.risk.thinning import halve, thinned
from kvsim.tensors.ensemble import draw, preset
from tests.quality.conftest import noise_cache


def _view(tokens: int = 256, sharpness: float = 1.0, seed: int = 0, dim: int = 16) -> HeadView:
    rng = np.random.default_rng(seed)
    keys, values = rng.standard_normal((tokens, dim)), rng.standard_normal((tokens, dim))
    return HeadView(keys, values, sharpness * rng.standard_normal((12, dim)), 0.25)


def _errors(view: HeadView, make: object, count: int, draws: int) -> np.ndarray:
    return np.array([squared_error(view, make(view, count, np.random.default_rng(n))) for n in range(draws)])


# --- spectrum -------------------------------------------------------------------------------------------------------


def test_the_spectrum_is_that_of_the_profiles() -> None:
    view = _view(100)
    shares, reading = view.attention()
    profiles = 100 * shares.T[:, :, None] * (view.values[:, None] - reading.outputs)
    flat = profiles.reshape(100, -1) / np.sqrt(len(shares))
    true = np.linalg.svd(flat, compute_uv=False) ** 2 / 100
    found = spectrum(view)
    assert found.eigenvalues[:90] == pytest.approx(true[:90], rel=1e-8)
    expected = (
        100 * (shares**2 * ((view.values[None] - reading.outputs[:, None]) ** 2).sum(axis=2)).sum(axis=1)
    ).mean()
    assert found.trace == pytest.approx(expected)
    assert found.eigenvalues.sum() == pytest.approx(found.trace)


def test_both_gram_matrices_have_the_same_spectrum() -> None:
    view = _view(300)
    by_tokens, by_queries = spectrum(view, 300), spectrum(view, 12 * 16)
    assert by_queries.eigenvalues == pytest.approx(by_tokens.eigenvalues[:192], abs=1e-9 * by_tokens.trace)


def test_fewer_queries_keep_the_trace() -> None:
    view = _view(300)
    assert spectrum(view, 64).trace == spectrum(view).trace
    assert len(spectrum(view, 64).eigenvalues) == 64
    assert spectrum(view, 64).eigenvalues.sum() == pytest.approx(spectrum(view).trace)


def test_rates() -> None:
    found = Spectrum(np.array([8.0, 4.0, 2.0, 1.0]), 15.0)
    assert found.query_aware_rate(6) == 3.0 / 6
    assert found.query_agnostic_rate(6) == 15.0 / 6
    assert found.streaming_rate(6, 60) == pytest.approx(np.log(12) * 2.5)
    assert found.query_aware_rate(12) == 0.0
    assert Spectrum(np.full(7, 3.0), 21.0).effective_rank == pytest.approx(7)
    assert Spectrum(np.zeros(7), 0.0).effective_rank == 0.0


# --- formulas against Monte Carlo -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "count", "sharpness"), [(512, 128, 1.0), (512, 256, 1.5), (1024, 256, 0.5)])
def test_uniform_sampling_errs_by_the_trace_over_k(tokens: int, count: int, sharpness: float) -> None:
    """First order in 1 / K: within 15 % and 3 standard errors."""
    view = _view(tokens, sharpness)
    errors = _errors(view, uniform_sample, count, 300)
    predicted = spectrum(view).trace / count
    assert errors.mean() == pytest.approx(predicted, abs=0.15 * predicted + 3 * errors.std() / np.sqrt(300))


@pytest.mark.parametrize(("count", "sharpness"), [(64, 0.5), (128, 1.0), (256, 3.0), (400, 3.0)])
def test_random_eviction_errs_by_the_finite_form(count: int, sharpness: float) -> None:
    """An interpolation: within 25 % and 3 standard errors, from diffuse to peaked."""
    view = _view(512, sharpness)
    errors = _errors(view, random_eviction, count, 300)
    shares, _ = view.attention()
    finite = float(random_eviction_error(shares[None], view.values[None], count)[1].mean())
    assert errors.mean() == pytest.approx(finite, abs=0.25 * finite + 3 * errors.std() / np.sqrt(300))


def test_the_trace_is_blind_where_one_token_has_all_attention() -> None:
    view = _view(512)
    view.keys[40] = 0.0
    queries = np.concatenate((view.queries, np.full((12, 1), 40.0)), axis=1)
    keys = np.concatenate((view.keys, (np.arange(512) == 40)[:, None]), axis=1)
    peaked = HeadView(keys, view.values, queries, 0.25)
    shares, _ = peaked.attention()
    assert shares[:, 40].min() > 0.6
    plain, finite = random_eviction_error(shares[None], peaked.values[None], 128)
    measured = _errors(peaked, random_eviction, 128, 200).mean()
    assert measured > 2 * plain.mean()
    assert finite.mean() == pytest.approx(measured, rel=0.35)


def test_uniform_sampling_is_unbiased() -> None:
    """Numerator and denominator, within 4 standard errors of 4,000 draws."""
    view = _view(128)
    scores = np.exp(view.logits)
    drawn = [uniform_sample(view, 32, np.random.default_rng(n)) for n in range(4000)]
    for pick, true in ((lambda one: one.denominators, scores.sum(axis=1)),
                       (lambda one: one.numerators[:, 0], scores @ view.values[:, 0])):  # fmt: skip
        found = np.array([np.exp(0.25 * view.queries @ one.keys.T) @ pick(one) for one in drawn])
        assert (np.abs(found.mean(axis=0) - true) < 4 * found.std(axis=0) / np.sqrt(4000)).all()


# --- comparators ----------------------------------------------------------------------------------------------------


def test_all_tokens_are_the_cache() -> None:
    view, rng = _view(64), np.random.default_rng(0)
    whole = (
        random_eviction(view, 64, rng),
        heavy_hitters(view, 64, view.queries),
        thinned(view, 64, view.queries, rng),
        pivoted_cholesky(view, 64, view.queries, rng),
        Entries.of_atoms(Atoms.of_tokens(view.keys, view.values)),
    )
    for entries in whole:
        assert squared_error(view, entries) == pytest.approx(0.0, abs=1e-9 * squared_output(view))


@pytest.mark.parametrize("make", [uniform_sample, random_eviction])
def test_risk_falls_with_more_tokens(make: object) -> None:
    means = [_errors(_view(), make, count, 40).mean() for count in (8, 32, 128, 250)]
    assert means == sorted(means, reverse=True)


def test_kernel_halving_balances_better_than_chance() -> None:
    """Squared maximum mean discrepancy of 128 of 1,024 points on a line, over 5 draws."""
    points = np.random.default_rng(0).standard_normal(1024)
    kernel = np.exp(-0.5 * (points[:, None] - points) ** 2)

    def discrepancy(kept: np.ndarray) -> float:
        signs = np.full(1024, -1 / 1024)
        signs[kept] += 1 / len(kept)
        return float(signs @ kernel @ signs)

    by_walk, by_chance = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        kept = rng.permutation(1024)
        by_chance.append(discrepancy(kept[:128]))
        for _ in range(3):
            kept = halve(kernel, kept, rng)
        by_walk.append(discrepancy(kept))
    assert 3 * np.mean(by_walk) < np.mean(by_chance)


def test_halving_keeps_one_of_each_pair() -> None:
    points = np.random.default_rng(1).permutation(40)
    kept = halve(np.eye(40), points, np.random.default_rng(2))
    assert all(len(set(pair) & set(kept.tolist())) == 1 for pair in points.reshape(20, 2).tolist())


def test_halving_refuses_other_counts() -> None:
    with pytest.raises(ValueError, match="not 100"):
        thinned(_view(256), 100, np.ones((1, 16)), np.random.default_rng(0))


def test_cholesky_needs_few_entries_for_a_small_kernel() -> None:
    """Short keys make exp(k.k') nearly of low rank."""
    view = _view(512, 0.5)
    view.keys[:] *= 0.3
    chosen = pivoted_cholesky(view, 64, view.queries, np.random.default_rng(0))
    assert squared_error(view, chosen) < 0.1 * _errors(view, random_eviction, 64, 20).mean()


def test_weighted_atoms_beat_the_others_on_diffuse_attention() -> None:
    kv = draw(preset("diffuse", num_layers=1, num_tokens=512), 3)
    view = head_view(kv.layers[0], 0, kv.attention_scale)
    known = kv.layers[0].prompt_queries[:4].reshape(-1, 128).astype(np.float64)
    compressor = Compressor(known, kv.attention_scale)
    atoms = Entries.of_atoms(compressor.compress(Atoms.of_tokens(view.keys, view.values), 64))
    others = (
        heavy_hitters(view, 64, known),
        thinned(view, 64, known, np.random.default_rng(0)),
        pivoted_cholesky(view, 64, known, np.random.default_rng(0)),
    )
    assert all(4 * squared_error(view, atoms) < squared_error(view, other) for other in others)


# --- the answer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [1, 2, 63, 64, 100])
def test_the_search_finds_the_fewest(least: int) -> None:
    assert fewest(lambda count: count >= least, 100) == least
    assert least <= fewest(lambda count: count >= least, 100, 1.02) <= max(least + 1, 1.02 * least + 1)


def test_compressibility_of_a_cache() -> None:
    kv = draw(preset("retrieval", num_layers=1, num_tokens=256, retrieval_heads=0.5, num_needles=4), 0)
    told: list[float] = []
    answer = compressibility(kv, 0.1, 64, told.append)
    assert [head.name for head in answer.heads] == ["L0H0", "L0H1"]
    assert told == [0.0, 0.5]
    for head in answer.heads:
        assert 1 <= head.atoms_compressed <= 256
        assert 1 <= head.atoms_heavy <= 256
        assert 1.0 <= head.effective_tokens <= 256
        assert 1.0 <= head.effective_rank <= 256
    worst, best = answer.breaking
    assert worst.error_compressed > 0.5
    assert best.error_compressed < 0.2
    assert answer.worst_layer[0] == 0
    assert answer.share("atoms_random") <= 1.0


def test_a_whole_budget_has_no_error() -> None:
    answer = compressibility(noise_cache(layers=1, tokens=40), 0.01, 1000)
    assert answer.budget_atoms == 40
    for head in answer.heads:
        assert head.error_compressed == pytest.approx(0.0, abs=1e-12)
        assert head.error_heavy == pytest.approx(0.0, abs=1e-12)
        assert head.error_random == pytest.approx(0.0, abs=1e-12)


def test_a_cache_without_queries_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="layer 0 has no queries"):
        compressibility(noise_cache(layers=1, tokens=40).without_queries(), 0.01, 10)
