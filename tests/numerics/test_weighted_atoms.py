"""Weighted atoms: what K entries must conserve of n, whatever the numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.numerics.balanced_clusters import add_up, balanced_clusters
from kvsim.numerics.query_samples import isotropic_queries, key_queries, resolved_spread
from kvsim.numerics.response_profiles import read, sketch, squared_influence, squared_removal
from kvsim.numerics.weighted_atoms import Atoms, AtomStream, Compressor

SCALE = 0.25


def _tokens(count: int, seed: int = 0, dim: int = 16) -> Atoms:
    rng = np.random.default_rng(seed)
    return Atoms.of_tokens(rng.standard_normal((count, dim)), rng.standard_normal((count, dim)))


def _compressor(seed: int = 1, dim: int = 16, **options: object) -> Compressor:
    queries = 2 * np.random.default_rng(seed).standard_normal((24, dim))
    return Compressor(queries, SCALE, **options)


def _outputs(compressor: Compressor, atoms: Atoms) -> np.ndarray:
    return read(compressor.logits(atoms), atoms.values).outputs


# --- clusters -------------------------------------------------------------------------------------------------------


@given(points=st.integers(1, 90), share=st.floats(0, 1), seed=st.integers(0, 50), is_even=st.booleans())
def test_clusters_are_balanced_and_none_is_empty(points: int, share: float, seed: int, is_even: bool) -> None:
    rng = np.random.default_rng(seed)
    count = max(1, round(points * share))
    sizes = np.ones(points) if is_even else rng.uniform(0.1, 9, points)
    labels = balanced_clusters(rng.standard_normal((points, 3)), sizes, count)
    held = np.bincount(labels, minlength=count)
    assert held.min() >= 1
    assert len(held) == count
    if is_even and (count & (count - 1)) == 0:
        # Each halving of equal sizes rounds once.
        assert held.max() - held.min() <= 1


def test_equal_shares_of_powers_of_two_are_exact() -> None:
    labels = balanced_clusters(np.random.default_rng(0).standard_normal((256, 4)), np.ones(256), 32)
    assert (np.bincount(labels) == 8).all()


def test_clusters_do_not_depend_on_order() -> None:
    rng = np.random.default_rng(2)
    points, order = rng.standard_normal((120, 5)), rng.permutation(120)
    plain = balanced_clusters(points, np.ones(120), 16)
    moved = balanced_clusters(points[order], np.ones(120), 16)
    assert np.array_equal(plain[order], moved)


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fill 5 clusters"):
        balanced_clusters(np.zeros((4, 2)), np.ones(4), 5)


def test_clusters_follow_the_groups_that_there_are() -> None:
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(8), 10)
    points = 100 * rng.standard_normal((8, 4))[groups] + rng.standard_normal((80, 4))
    labels = balanced_clusters(points, np.ones(80), 8)
    assert all(len(set(labels[groups == group])) == 1 for group in range(8))


def test_sums_by_label() -> None:
    rows = np.arange(10.0).reshape(5, 2)
    assert np.array_equal(add_up(np.array([1, 0, 1, 2, 0]), rows, 3), [[10, 12], [4, 6], [6, 7]])


# --- profiles -------------------------------------------------------------------------------------------------------


def _profiles(compressor: Compressor, atoms: Atoms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, m, Dv), with shares and outputs."""
    logits = compressor.logits(atoms)
    seen = read(logits, atoms.values)
    shares = seen.shares(logits)
    return shares.T[:, :, None] * (atoms.values[:, None] - seen.outputs), shares, seen.outputs


def test_profiles_add_up_to_zero_and_their_norms_are_as_said() -> None:
    compressor, atoms = _compressor(), _tokens(200)
    profiles, shares, outputs = _profiles(compressor, atoms)
    assert profiles.sum(axis=0) == pytest.approx(0.0, abs=1e-12)
    assert squared_influence(shares, atoms.values, outputs) == pytest.approx((profiles**2).sum(axis=2).mean(axis=1))


def test_removal_is_what_leaving_an_entry_out_does() -> None:
    compressor, atoms = _compressor(), _tokens(40)
    atoms.keys[7] = 3 * compressor.queries[0]
    _, shares, outputs = _profiles(compressor, atoms)
    assert shares[0, 7] > 0.99
    expected = [
        ((_outputs(compressor, atoms.take(np.delete(np.arange(40), gone))) - outputs) ** 2).sum(axis=1).mean()
        for gone in range(40)
    ]
    assert squared_removal(shares, atoms.values, outputs) == pytest.approx(expected, rel=1e-4)


def test_products_of_sketches_are_those_of_profiles_in_the_mean() -> None:
    compressor, atoms = _compressor(), _tokens(60)
    profiles, shares, outputs = _profiles(compressor, atoms)
    true = np.einsum("imd,jmd->ij", profiles, profiles) / len(shares)
    features = sketch(shares, atoms.values, outputs, 40_000)
    # Standard error of a product of F features is about sqrt(2 / F) of the norms; 5 of them.
    norms = np.sqrt(np.diagonal(true))
    assert (np.abs(features @ features.T - true) <= 5 * np.sqrt(4 / 40_000) * norms[:, None] * norms).all()


# --- atoms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["attention", "count"])
@pytest.mark.parametrize("count", [1, 2, 3, 17, 64, 199])
def test_every_token_is_in_one_atom(count: int, weighting: str) -> None:
    atoms = _compressor(weighting=weighting).compress(_tokens(200), count)
    assert len(atoms) == count
    assert atoms.sizes.sum() == 200
    assert (np.diff(atoms.newest) > 0).all()
    assert atoms.newest[-1] == 199
    if weighting == "count":
        assert np.exp(atoms.log_weights).sum() == pytest.approx(200, rel=1e-12)
        assert np.exp(atoms.log_weights) == pytest.approx(atoms.sizes)
        assert np.exp(atoms.log_weights) @ atoms.values == pytest.approx(_tokens(200).values.sum(axis=0), abs=1e-9)


def test_attention_weights_conserve_the_samples_attention() -> None:
    """Atom by atom, as the sample's mean; and so in all."""
    compressor, tokens = _compressor(), _tokens(200)
    atoms = compressor.compress(tokens, 32)
    seen = read(compressor.logits(tokens), tokens.values)
    assert (atoms.log_weights <= np.log(200)).all()
    assert seen.shares(compressor.logits(atoms)).mean(axis=0).sum() == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("count", [200, 201, 5000])
def test_enough_atoms_are_the_cache(count: int) -> None:
    tokens = _tokens(200)
    assert _compressor().compress(tokens, count) is tokens
    assert _compressor().compress_blocks(tokens, count, 16) is tokens


@pytest.mark.parametrize("weighting", ["attention", "count"])
def test_duplicates_are_merged_without_error(weighting: str) -> None:
    """16 tokens, each 8 times, are 16 atoms."""
    once = _tokens(16, seed=4)
    order = np.random.default_rng(5).permutation(128)
    tokens = Atoms.of_tokens(np.tile(once.keys, (8, 1))[order], np.tile(once.values, (8, 1))[order])
    # The newest token stays as it is, and one of K atoms is lost to it.
    compressor = _compressor(weighting=weighting, heavy_fraction=0.0)
    newest = len(tokens) - 1
    twins = np.flatnonzero((tokens.keys == tokens.keys[newest]).all(axis=1))
    rest = tokens.take(np.setdiff1d(np.arange(128), twins[twins != newest]))
    atoms = compressor.compress(rest, 16)
    assert _outputs(compressor, atoms) == pytest.approx(_outputs(compressor, rest), abs=1e-9)


def test_tokens_have_no_order_but_for_the_newest() -> None:
    compressor, tokens = _compressor(), _tokens(150)
    order = np.concatenate((np.random.default_rng(6).permutation(149), [149]))
    moved = Atoms.of_tokens(tokens.keys[order], tokens.values[order])
    one, other = compressor.compress(tokens, 40), compressor.compress(moved, 40)
    first, second = (part.keys[np.lexsort(part.keys.T)] for part in (one, other))
    assert first == pytest.approx(second, abs=1e-9)


def test_error_falls_with_atoms() -> None:
    compressor, tokens = _compressor(), _tokens(1024)
    truth = _outputs(compressor, tokens)
    errors = [
        np.mean((_outputs(compressor, compressor.compress(tokens, count)) - truth) ** 2)
        for count in (8, 32, 128, 512, 1000)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * errors[0]


def test_the_heavy_token_is_exact() -> None:
    """What equal clusters alone would dilute."""
    compressor, tokens = _compressor(), _tokens(300)
    loud = 5 * compressor.queries.mean(axis=0) / np.linalg.norm(compressor.queries.mean(axis=0))
    tokens.keys[77] = 4 * loud
    kept = compressor.compress(tokens, 8)
    assert 77 in kept.newest
    assert kept.log_weights[kept.newest == 77] == 0.0


# --- forms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_tokens", [10, 64, 100, 1000])
def test_blocks_make_as_many_atoms_of_all_tokens(block_tokens: int) -> None:
    compressor, tokens = _compressor(), _tokens(500)
    atoms = compressor.compress_blocks(tokens, 40, block_tokens)
    assert len(atoms) == 40
    assert atoms.sizes.sum() == 500
    truth = _outputs(compressor, tokens)
    whole = np.mean((_outputs(compressor, compressor.compress(tokens, 40)) - truth) ** 2)
    assert np.mean((_outputs(compressor, atoms) - truth) ** 2) < 3 * whole


@pytest.mark.parametrize("pieces", [1, 7, 30])
def test_a_stream_is_the_cache_until_it_is_full(pieces: int) -> None:
    compressor, tokens = _compressor(), _tokens(30)
    held = AtomStream(compressor, 32, 16)
    for part in np.array_split(np.arange(30), pieces):
        held.append(tokens.keys[part], tokens.values[part])
    assert np.array_equal(held.atoms.keys, compressor.compress(tokens, 32).keys)
    assert np.array_equal(held.atoms.newest, np.arange(30))


def test_a_stream_holds_atoms_and_buffer_at_most() -> None:
    tokens = _tokens(500)
    held, again = AtomStream(_compressor(), 32, 16), AtomStream(_compressor(), 32, 16)
    for row in range(500):
        held.append(tokens.keys[row : row + 1], tokens.values[row : row + 1])
        assert held.num_entries < 48
    again.append(tokens.keys, tokens.values)
    assert np.array_equal(held.atoms.keys, again.atoms.keys)
    assert held.atoms.sizes.sum() == 500


# --- drawn queries --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [isotropic_queries, key_queries])
def test_drawn_queries_have_the_spread_asked_for(draw: object) -> None:
    keys = np.random.default_rng(7).standard_normal((400, 16)) * np.geomspace(30, 0.1, 16)
    queries = draw(keys, SCALE, 64, 1.7)
    logits = SCALE * queries @ (keys - keys.mean(axis=0)).T
    assert np.sqrt(np.mean(logits**2)) == pytest.approx(1.7)


def test_isotropic_queries_look_along_every_direction_alike() -> None:
    keys = np.random.default_rng(8).standard_normal((400, 4)) * np.array([30.0, 5.0, 1.0, 0.2])
    logits = SCALE * isotropic_queries(keys, SCALE, 20_000, 1.0) * keys.std(axis=0)
    # The sample's principal directions are not quite the axes.
    assert logits.std(axis=0) == pytest.approx(np.full(4, 0.5), rel=0.1)


def test_the_spread_leaves_as_many_effective_tokens_as_atoms() -> None:
    logits = resolved_spread(4096, 512) * np.random.default_rng(9).standard_normal((400, 4096))
    shares = read(logits, np.zeros((4096, 1))).shares(logits)
    assert 1 / (shares**2).sum(axis=1).mean() == pytest.approx(512, rel=0.1)


def test_pooling_keeps_what_stands_beside_a_heavy_token() -> None:
    compressor, tokens = _compressor(kernel_size=5), _tokens(300)
    tokens.keys[77] = 8 * compressor.queries.mean(axis=0)
    kept = compressor.compress(tokens, 14)
    assert set(range(75, 80)) <= set(kept.newest[kept.log_weights == 0.0].tolist())
    assert len(_compressor(kernel_size=5).compress(_tokens(3), 2)) == 2
