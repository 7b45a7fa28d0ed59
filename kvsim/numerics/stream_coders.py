"""Entropy coders whose bit streams `constriction` writes and reads: rANS and range coding."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvsim.numerics.entropy import Codes, Counts, count_rows, quantised_frequencies

WORD_BITS: Final = 32
"""Of constriction's words; a stream is a whole number of them."""
TABLE_BITS: Final = 12
"""Precision of a static table, as in kernels/entropy/rans: frequencies sum to 2^12."""


def table_bits(counts: Counts) -> int:
    """Bits of a static table: which symbols occur, and the frequency of each of them."""
    return len(counts) + TABLE_BITS * int(np.count_nonzero(counts))


def rans_bits(rows: Codes, levels: int, segment: int) -> float:
    """Code each row, (R, n), with its own static table by rANS (Duda, arXiv 1311.2540), and decode it again.

    ``segment`` symbols at a time make one stream with a 32-bit length, so that segments decode independently.

    Raises
    ------
    RuntimeError
        What came back differs: a bug.
    """
    bits = 0
    for row, counts in zip(rows, count_rows(rows, levels), strict=True):
        bits += table_bits(counts)
        dense, model = _static_model(row, counts)
        for start in range(0, len(row), segment):
            bits += WORD_BITS
            if model is not None:
                bits += _rans_segment(dense[start : start + segment], model)
    return float(bits)


def range_bits(rows: Codes, levels: int) -> float:
    """Code each row, (R, n), with its own static table by range coding, all in one stream, and decode it again.

    Raises
    ------
    RuntimeError
        What came back differs: a bug.
    """
    counts = count_rows(rows, levels)
    pairs = [_static_model(row, count) for row, count in zip(rows, counts, strict=True)]
    shown = [(dense, model) for dense, model in pairs if model is not None]
    return float(sum(table_bits(count) for count in counts) + _range_stream(shown))


def range_bits_under(rows: Codes, probabilities: NDArray[np.float64]) -> float:
    """Code each row, (R, n), under a law that both sides have already, (R, levels), all above 0.

    Raises
    ------
    RuntimeError
        What came back differs: a bug.
    """
    return float(_range_stream([(row, _categorical(one)) for row, one in zip(rows, probabilities, strict=True)]))


def adaptive_bits(codes: Codes, levels: int) -> tuple[float, float]:
    """Code one head, (n, D), token by token by range coding; both sides learn each channel's law as they go.

    Give the bits taken, and those of an ideal coder under the same predictions (see `AdaptiveModel`).

    Raises
    ------
    RuntimeError
        What came back differs: a bug.
    """
    import constriction

    family = constriction.stream.model.Categorical(perfect=False)
    encoder, learner, ideal = constriction.stream.queue.RangeEncoder(), AdaptiveModel(codes.shape[1], levels), 0.0
    for token in codes:
        predicted = learner.predict()
        ideal -= float(np.log2(predicted[np.arange(len(token)), token]).sum())
        encoder.encode(token, family, predicted)
        learner.learn(token)
    words = encoder.get_compressed()
    decoder, learner = constriction.stream.queue.RangeDecoder(words), AdaptiveModel(codes.shape[1], levels)
    for token in codes:
        back = decoder.decode(family, learner.predict())
        _check(token, back)
        learner.learn(back)
    return float(WORD_BITS * len(words)), ideal


class AdaptiveModel:
    """Predicts each channel of the next token from the tokens before it.

    A channel's own counts, with ``BELIEF`` tokens' worth of prior belief in the law of all channels of the head, which
    is known after few tokens; that law itself starts flat. Ours: CacheGen learns its laws offline instead.
    """

    BELIEF: Final = 8.0

    def __init__(self, channels: int, levels: int) -> None:
        self._own = np.zeros((channels, levels))
        self._shared = np.full(levels, 0.5)
        self._seen = 0

    def predict(self) -> NDArray[np.float64]:
        """Probabilities, (channels, levels), all above 0."""
        shared = self._shared / self._shared.sum()
        return np.asarray((self._own + self.BELIEF * shared) / (self._seen + self.BELIEF), dtype=np.float64)

    def learn(self, token: Codes) -> None:
        """Take in one token's codes, (channels,)."""
        self._own[np.arange(len(token)), token] += 1.0
        self._shared += np.bincount(token, minlength=len(self._shared))
        self._seen += 1


def _static_model(row: Codes, counts: Counts) -> tuple[Codes, Any]:
    """Symbols renumbered to those that occur, and their law; None where only one does and nothing need be said."""
    used = np.flatnonzero(counts)
    dense = np.searchsorted(used, row).astype(np.int32)
    if len(used) < 2:
        return dense, None
    frequencies = quantised_frequencies(counts[used], max(1 << TABLE_BITS, 1 << int(len(used) - 1).bit_length()))
    return dense, _categorical(frequencies / frequencies.sum())


def _categorical(probabilities: NDArray[np.float64]) -> Any:
    import constriction

    return constriction.stream.model.Categorical(np.asarray(probabilities, dtype=np.float64), perfect=False)


def _rans_segment(symbols: Codes, model: Any) -> int:
    import constriction

    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols, model)
    words = coder.get_compressed()
    _check(symbols, constriction.stream.stack.AnsCoder(words).decode(model, len(symbols)))
    return WORD_BITS * len(words)


def _range_stream(rows: list[tuple[Codes, Any]]) -> int:
    import constriction

    encoder = constriction.stream.queue.RangeEncoder()
    for symbols, model in rows:
        encoder.encode(symbols, model)
    words = encoder.get_compressed()
    decoder = constriction.stream.queue.RangeDecoder(words)
    for symbols, model in rows:
        _check(symbols, decoder.decode(model, len(symbols)))
    return WORD_BITS * len(words)


def _check(coded: Codes, decoded: Codes) -> None:
    if not np.array_equal(coded, decoded):
        msg = "an entropy coder gave back other codes than it was given"
        raise RuntimeError(msg)
