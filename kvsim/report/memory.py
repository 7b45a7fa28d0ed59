"""Where KV lies: the device's pool, and the tiers below it."""

from __future__ import annotations

from kvsim.specs.base import Basis, Spec


class KvCapacity(Spec):
    """KV cache as the engine allocates it, on one replica."""

    kv_bytes_per_token: float
    """All layers, one sequence, encoded, metadata included, summed over tensor-parallel ranks."""
    native_kv_bytes_per_token: float
    fold: float
    """native / encoded bytes of a resident sequence of the workload's mean length."""
    compression_ratio: float
    """Fraction of KV bytes removed (kvpress's meaning)."""
    block_size: int
    num_blocks: int
    """Blocks of ``block_size`` tokens in the pool for plain growth."""
    capacity_tokens: int
    """Resident tokens that the pool holds."""
    sequence_tokens: int
    """Mean prompt plus output of the workload, rounded: the length that the next two figures use."""
    sequence_kv_bytes: float
    """Resident KV of one such sequence at its end."""
    max_concurrency: float
    """Such sequences that fit at once."""
    peak_kv_utilization: float | None
    """Largest share of the pool in use during the run; None for an estimate without a queue."""
    basis: Basis


class MemoryTerm(Spec):
    """One bar of the memory waterfall, per device."""

    name: str
    size_bytes: float
    basis: Basis
    formula: str


class TierUse(Spec):
    """One tier below the device's pool, over all replicas and ranks."""

    name: str
    kind: str
    encoding: str
    store: str
    """When blocks come here: ``on_compute`` or ``on_evict``."""
    is_lossy: bool
    """Whether what is loaded from here differs from what was computed."""
    capacity_bytes: float | None
    """None is unbounded."""
    peak_bytes: float
    """Most bytes held, those on their way in included; summed over replicas whose peaks may fall apart."""
    stored_bytes: float
    """Written here, from wherever."""
    demoted_bytes: float
    """Of those, evicted by the tier above."""
    promoted_bytes: float
    """Of those, kept while they passed from a tier below."""
    evicted_bytes: float
    refused_bytes: float
    """Not stored because no room could be made."""
    loaded_bytes: float
    hit_units: int
    """Blocks of the workload's hashes that were loaded from here."""
    hit_tokens: int
    hit_rate: float | None
    """hit_tokens / tokens looked up; None where nothing was."""
    copy_s: float
    """Time that its copies would take alone, latency and coding included; summed over replicas."""
    loads: int
    """Loads, each for one prompt."""
    wait_mean_s: float | None
    """Mean duration of a load, what other copies and steps took of the links included."""


class TiersUse(Spec):
    """Where cached prompt tokens came from. Only prompts that were admitted count, again after each preemption."""

    looked_up_tokens: int
    """Tokens of whole hashed blocks that prompts could have reused."""
    device_hit_tokens: int
    """Found in the device's own prefix cache."""
    device_hit_rate: float | None
    tiers: tuple[TierUse, ...]
    recompute_tokens: int | None
    """Computed again although they had been before; None without a recompute tier."""
    recompute_s: float | None
    """What a prefill of them alone is estimated to take."""
    lossy_tokens: int
    """Loaded from lossy tiers. Later hits of the same blocks on the device are not counted again."""
    reload: str
    """``always``, ``by_cost`` or ``by_total_cost``."""
    chose_load: int | None
    """Prompts for which loading all that was found was estimated fastest; None where costs are not compared."""
    chose_cut: int | None
    """Prompts for which loading the nearer tiers' part and computing the rest was."""
    chose_compute: int | None
    """Prompts for which computing all of it was."""
    saved_against_load_s: float | None
    """Estimated time saved, summed over prompts, against always loading, by the same measure as the choice."""
    saved_against_compute_s: float | None
    """The same against never loading."""
