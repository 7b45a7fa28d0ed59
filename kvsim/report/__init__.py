"""The answer: one value that JSON, Parquet, terminal and dashboard all show. Nothing here computes."""

from __future__ import annotations

from typing import Literal

from kvsim.ops import Component
from kvsim.scenario import Scenario
from kvsim.specs.base import Basis, Spec
from kvsim.specs.price import Price

SCHEMA_VERSION = 1


class Figure(Spec):
    """A number with what it rests on. ``value`` None is unknown; low and high are the band where a model made it."""

    value: float | None
    low: float | None = None
    high: float | None = None
    basis: Basis | None = None


class LatencyStats(Spec):
    """Distribution of one latency in seconds; ``count`` is how many samples it rests on.

    A p99 of fewer than 100 samples is None.
    """

    count: int
    mean_s: Figure
    median_s: Figure
    std_s: Figure
    p90_s: Figure
    p95_s: Figure
    p99_s: Figure


class Latency(Spec):
    """vLLM bench's four latencies. TPOT excludes the first token: (e2el - ttft) / (output_tokens - 1).

    ITL pools every gap of every request.
    """

    ttft: LatencyStats
    tpot: LatencyStats
    itl: LatencyStats
    e2el: LatencyStats


class Throughput(Spec):
    """Rates over the run's duration."""

    request_throughput: Figure
    output_throughput: Figure
    total_token_throughput: Figure
    request_goodput: Figure
    """Requests per second that meet every SLO; unknown where none is set."""
    slo_attainment: Figure
    """Share of completed requests that meet every SLO."""


class Counts(Spec):
    """What happened to requests, tokens and steps. arrived = completed + rejected."""

    num_prompts: int
    completed: int
    rejected: int
    total_input_tokens: int
    total_output_tokens: int
    cached_prompt_tokens: int
    """Prompt tokens served from the prefix cache."""
    recomputed_tokens: int
    """Tokens processed again after preemption."""
    preemptions: int
    engine_steps: int
    max_concurrent_requests: int
    max_waiting_requests: int


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


class SpeculationOutcome(Spec):
    """What speculative decoding did in a run."""

    acceptance_length: float | None
    """Mean tokens that came out of one verification, the model's own included; answers that end early count as cut."""
    expected_acceptance_length: float
    """The same by the scenario's acceptance, for answers without end."""
    verifications: int
    """Steps of single sequences that verified drafts."""
    drafting_share: float | None
    """Part of decode steps' time that drafting took."""


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


class TimeShare(Spec):
    """Busy engine time spent on one component, and on what basis it was priced."""

    component: Component
    prefill_s: float
    decode_s: float
    share: float
    basis: Basis


class Effects(Spec):
    """Four separate effects against the uncompressed cache, as ratios to it (1 = no change, higher is better).

    ``prefill_tax`` > 1 means that prefill takes longer. ``queueing_effect`` needs two simulations and is None outside
    a comparison.
    """

    prefill_tax: Figure
    """Prefill seconds of the mean prompt / native."""
    decode_gain: Figure
    """Native decode step seconds / this strategy's, at the same batch and context."""
    capacity_gain: Figure
    """Sequences that fit / native."""
    queueing_effect: Figure
    """Native mean queueing delay / this strategy's."""
    reference_batch: int
    reference_context_tokens: int


class Cost(Spec):
    """Dollars. Input and output split by the engine time that each phase took."""

    price: Price | None
    usd_per_hour: Figure
    """Whole deployment: price x devices."""
    usd_per_million_input_tokens: Figure
    usd_per_million_output_tokens: Figure
    usd_per_million_total_tokens: Figure
    tokens_per_usd: Figure
    engine_utilization: float | None
    """Share of the run in which the engine was busy: an output, not a guess."""


class Energy(Spec):
    """Joules of the devices alone (no host, no cooling)."""

    joules_per_output_token: Figure
    joules_per_total_token: Figure
    mean_power_w: Figure


class QualityNote(Spec):
    """One published score, or the word unknown."""

    task: str
    metric: str
    value: float
    baseline: float
    model: str
    source: str


class Quality(Spec):
    """What is known of the quality risk; unknown is said, never shown as zero."""

    status: Literal["unknown", "baseline", "published"] = "unknown"
    notes: tuple[QualityNote, ...] = ()


class BasisShare(Spec):
    """Share of busy engine time that rests on one basis."""

    basis: Basis
    share: float


class KernelUsed(Spec):
    """A fitted kernel that priced an operation."""

    operation: str
    kernel: str
    version: str
    artefact: str
    """Hash that names it in the calibration set."""
    basis: Basis


class LevelUse(Spec):
    """One level of an adaptive compression in a run."""

    level: int
    compression: str
    kv_bytes_per_token: float
    """All layers, summed over tensor-parallel ranks."""
    prompts: int
    """Prompts let in at this level; one that was preempted counts again."""
    tokens_decoded: int
    """Tokens that decode steps made from a cache at this level."""
    policy_s: float
    """How long the policy stood here, summed over replicas."""


class ClassUse(Spec):
    """One class of requests in an adaptive run."""

    name: str
    completed: int
    tokens_decoded: tuple[int, ...]
    """By level."""
    reduced_share: Figure
    """Share of them decoded at a level after the first."""
    ttft_p99_s: Figure
    tpot_median_s: Figure


class AdaptiveAction(Spec):
    """One act of the policy. Encoding running sequences again keeps the level and names how many."""

    time_s: float
    replica: int
    from_level: int
    to_level: int
    reason: str
    kv_utilization: float
    """Share of the pool in use when it acted."""
    waiting: int
    requantized_sequences: int
    freed_bytes: int
    """On one tensor-parallel rank."""


class PolicyOutcome(Spec):
    """What a policy gave on these requests, central edge: the adaptive one, or a level held throughout."""

    policy: str
    compression: str
    reason: str | None = None
    """Why it cannot run."""
    duration_s: Figure = Figure(value=None)
    queue_delay_mean_s: Figure = Figure(value=None)
    ttft_p99_s: Figure = Figure(value=None)
    tpot_median_s: Figure = Figure(value=None)
    e2el_p99_s: Figure = Figure(value=None)
    output_throughput: Figure = Figure(value=None)
    request_goodput: Figure = Figure(value=None)
    preemptions: int | None = None
    reduced_share: Figure = Figure(value=None)
    """Share of tokens decoded at a level after the first: how much the loss of quality could touch."""


class AdaptiveUse(Spec):
    """When an adaptive compression acted, on what, and what that bought. All of the central edge."""

    levels: tuple[LevelUse, ...]
    classes: tuple[ClassUse, ...]
    actions: tuple[AdaptiveAction, ...]
    """The first ones of all replicas in order of time; ``total_actions`` counts all."""
    total_actions: int
    tightened: int
    relaxed: int
    requantized_sequences: int
    requantized_tokens: int
    requantize_freed_bytes: int
    """Over all replicas, on one tensor-parallel rank each."""
    requantize_s: float
    """Time that steps took longer for it."""
    reduced_share: Figure
    """Share of decoded tokens at a level after the first."""
    outcomes: tuple[PolicyOutcome, ...]
    """This policy, then each level held throughout, on the same requests."""


class Provenance(Spec):
    """What made this report."""

    kvsim_version: str
    scenario_sha256: str
    calibration: str
    """Which set priced the operations; the priors' name where none did."""
    device: str
    model: str
    model_source: str
    workload_source: str
    kernels: tuple[KernelUsed, ...] = ()
    """Fitted kernels that priced operations; priors priced the rest."""
    notes: tuple[str, ...] = ()
    """What a reader must know: aliases resolved, features switched off and why, assumptions."""


class PoolReport(Spec):
    """One pool of a disaggregated deployment. What only a simulation counts is None in an estimate."""

    role: Literal["prefill", "decode"]
    device: str
    num_replicas: int
    tensor_parallel_size: int
    memory: tuple[MemoryTerm, ...]
    """Per device."""
    num_blocks: int
    """Of one replica."""
    peak_kv_utilization: float | None
    """Largest share of a replica's pool in use; KV that has not left yet counts on the prefill side."""
    utilization: Figure
    """Share of the run in which the replicas' engines were busy, their mean."""
    engine_steps: int | None
    preemptions: int | None
    recomputed_tokens: int | None
    cached_prompt_tokens: int | None
    max_running: int | None
    """Most sequences with a seat in one replica."""
    max_waiting: int | None
    """Longest queue of one replica; on the decode side, sequences whose KV waits for room."""
    usd_per_hour: Figure


class TransferReport(Spec):
    """KV between the pools. Means are per sequence that crossed."""

    link: str
    link_bytes_per_s: Figure
    """Of one port, one direction, efficiency applied."""
    setup_s: Figure
    transfer: str
    encoding: str | None
    """Encoding in transit alone; None where KV moves as it is stored."""
    is_lossy: bool
    """Whether the link's encoding loses precision on top of the strategy's."""
    transfers: int
    wire_bytes: int
    bytes_per_transfer: float | None
    transfer_mean_s: Figure
    """From the start of a transfer to its end."""
    room_wait_mean_s: Figure
    """From a prompt's end until the decode side had room and looked for it."""
    exposed_mean_s: Figure
    """From a prompt's end to the arrival of its KV: what the transfer adds to the gap before the second token."""
    link_utilization: Figure
    """Bytes moved / what the busier side's ports could have moved in the run."""
    max_in_flight: int | None
    source: str


class DisaggregationReport(Spec):
    """Two pools and what crossed between them."""

    pools: tuple[PoolReport, ...]
    transfer: TransferReport


class Report(Spec):
    """Everything kvsim answers about one scenario. ``method`` tells a simulation from a closed-form estimate."""

    schema_version: int = SCHEMA_VERSION
    method: Literal["simulation", "estimate"]
    strategy: str
    scenario: Scenario
    kv: KvCapacity
    memory: tuple[MemoryTerm, ...]
    duration_s: Figure
    queue_delay_mean_s: Figure
    request_overhead_s: Figure
    """Time of a request outside the engine, in TTFT and E2EL; queueing for the front end comes on top."""
    latency: Latency
    throughput: Throughput
    counts: Counts
    tiers: TiersUse | None = None
    """None without tiers, in an estimate, and where no prefix can be shared."""
    time_split: tuple[TimeShare, ...]
    bottleneck: str
    effects: Effects
    cost: Cost
    energy: Energy
    quality: Quality
    adaptive: AdaptiveUse | None = None
    """What an adaptive compression did; None where one compression serves every request."""
    coverage: tuple[BasisShare, ...]
    provenance: Provenance
    speculation: SpeculationOutcome | None = None
    """None where the engine decodes without drafts."""
    disaggregation: DisaggregationReport | None = None
    """Per pool; ``kv``, ``memory`` and the decode side of ``effects`` are then of the decode pool."""
