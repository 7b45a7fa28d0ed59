"""How much smaller data-dependent coding makes KV: published figures of coders, and rates measured on ensembles."""

from __future__ import annotations

from functools import lru_cache

from kvsim.compression.base import StrategyPart
from kvsim.compression.spelling import bare_name, spell_part
from kvsim.data_files import data_dir
from kvsim.documents import load_yaml, validate
from kvsim.specs.base import Spec
from kvsim.specs.prior import Positive, Prior, PriorTable


class CoderPriors(Spec):
    """Published figures of one coder; rates are bytes of the 16-bit cache per second of one device."""

    lossy: bool
    ratio: Prior
    encode_bytes_per_s: PriorTable
    decode_bytes_per_s: PriorTable


class KvCoders(Spec):
    """All coders by name."""

    schema_version: int
    name: str
    coders: dict[str, CoderPriors]


class Share(Spec):
    """Coded size as a share of the size without coding: mean over ensembles, and their span."""

    value: Positive
    low: Positive
    high: Positive


class KvRates(Spec):
    """Shares measured on synthetic ensembles by ``tools/write_kv_rates.py``."""

    schema_version: int
    name: str
    source: str
    codings: dict[str, dict[str, Share]]
    """Encoding, then coding: bits of coded codes / bits of codes of fixed width."""
    codecs: dict[str, Share]
    """Whole codec: bits / bits of the 16-bit cache, native tokens left out."""


@lru_cache(maxsize=1)
def load_coders() -> KvCoders:
    """Read ``calibration/priors/kv_coders.yaml``."""
    path = data_dir("calibration/priors") / "kv_coders.yaml"
    return validate(KvCoders, load_yaml(path), path.name)


@lru_cache(maxsize=1)
def load_rates() -> KvRates:
    """Read ``calibration/priors/kv_rates.yaml``."""
    path = data_dir("calibration/priors") / "kv_rates.yaml"
    return validate(KvRates, load_yaml(path), path.name)


def coding_share(encoding: StrategyPart, coding: StrategyPart) -> Prior | None:
    """Measured share of a coding after an encoding, or None; parameters that were not measured use the bare name's."""
    rates = load_rates()
    for encoding_name in (spell_part(encoding), bare_name(encoding)):
        by_coding = rates.codings.get(encoding_name, {})
        for coding_name in (spell_part(coding), bare_name(coding)):
            if coding_name in by_coding:
                return _prior(by_coding[coding_name], rates.source)
    return None


def codec_share(codec: StrategyPart) -> Prior:
    """Share of the 16-bit cache that a whole codec takes: the published one; its band holds the measured ones too."""
    coders, rates = load_coders().coders, load_rates()
    name = spell_part(codec) if spell_part(codec) in coders else bare_name(codec)
    published, measured = coders[name].ratio, rates.codecs.get(name)
    low, high = 1.0 / published.high, 1.0 / published.low
    source = published.source
    if measured is not None:
        low, high = min(low, measured.low), max(high, measured.high)
        source += f"; band widened by {measured.low:.3f} to {measured.high:.3f} of the 16-bit cache, {rates.source}"
    return Prior(value=1.0 / published.value, low=low, high=high, source=source)


def _prior(share: Share, source: str) -> Prior:
    return Prior(value=share.value, low=share.low, high=share.high, source=source)
