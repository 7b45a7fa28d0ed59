"""The analytic answer for two pools: each in a steady state at the rate that the slowest of pools and link allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvsim.analysis import LoadShape, resident_bytes
from kvsim.closed_form import SteadyState, decode_split, prefill_split, steady_state, total_seconds
from kvsim.cost.front_end import front_end
from kvsim.cost.priors import Edge
from kvsim.cost.step import StepModel
from kvsim.disaggregation import SplitDeployment
from kvsim.energy import PhaseSeconds
from kvsim.estimate import REFERENCE_S, mean_only, scaled
from kvsim.memory import MemoryPlan
from kvsim.sim.disaggregated import Crossing
from kvsim.sim.handover import TransferRecord
from kvsim.summary import Outcome
from kvsim.units import TICKS_PER_SECOND, seconds_to_ticks

BISECTIONS = 60


@dataclass(frozen=True)
class _Stage:
    """Prices of one edge at the mean lengths."""

    prefill: StepModel
    decode: StepModel
    crossing: Crossing
    load: LoadShape
    slots: float
    """Sequences that one decode replica holds."""

    @property
    def prompt_s(self) -> float:
        return total_seconds(prefill_split(self.prefill, self.load.prompt_tokens))

    @property
    def kv_bytes(self) -> int:
        """Of one prompt, over the decode side's ranks."""
        profile = self.decode.sequences.profile(self.load.prompt_tokens)
        deployment = self.decode.deployment
        return profile.resident_bytes(0, deployment.engine.block_size) * deployment.tensor_parallel_size

    @property
    def wire_s(self) -> float:
        """One prompt's bytes over ports that nothing else uses."""
        rate = min(self.crossing.send_bytes_per_s, self.crossing.receive_bytes_per_s)
        return self.kv_bytes * self.crossing.rules.wire_share / rate

    @property
    def moving_s(self) -> float:
        """A transfer from its start to its end, but for what overlaps the prompt."""
        rules = self.crossing.rules
        setup_s = rules.setup_ticks / TICKS_PER_SECOND
        coder_s = self.kv_bytes * rules.coder_seconds_per_byte
        if rules.mode == "after_prefill":
            return setup_s + coder_s + self.wire_s
        layer_s = self.wire_s / rules.num_layers
        before = max(self.prompt_s / rules.num_layers, setup_s) + self.wire_s - layer_s
        return max(0.0, before - self.prompt_s) + coder_s / rules.num_layers + layer_s

    @property
    def ceiling(self) -> float:
        """Most requests per second of the prefill pool and of the ports."""
        crossing, prefills = self.crossing, self.prefill.deployment.replicas
        decodes = self.decode.deployment.replicas
        rate = min(crossing.send_bytes_per_s * prefills, crossing.receive_bytes_per_s * decodes)
        return min(prefills / self.prompt_s, rate / (self.kv_bytes * crossing.rules.wire_share))

    def decoding(self, rate: float | None) -> SteadyState:
        """One decode replica at its share of ``rate``; None is as much as it can."""
        share = rate / self.decode.deployment.replicas if rate is not None else None
        return steady_state(self.decode, 0.0, self.load.prompt_tokens, self.load.output_tokens, share, self.slots)


def estimate_split_outcomes(
    split: SplitDeployment,
    prefill: Mapping[Edge, StepModel],
    decode: Mapping[Edge, StepModel],
    plans: Mapping[Edge, MemoryPlan],
    load: LoadShape,
) -> tuple[tuple[Outcome, ...], float]:
    """One outcome per edge, and the central decode batch; ``plans`` are the decode pool's."""
    results, batches = [], []
    for edge, step in decode.items():
        pool_bytes = plans[edge].num_blocks * plans[edge].block_bytes
        slots = min(
            float(step.deployment.engine.max_num_seqs), max(1.0, pool_bytes / max(resident_bytes(step, load), 1))
        )
        stage = _Stage(prefill[edge], step, split.crossing(edge), load, slots)
        rate = _rate(stage)
        state = stage.decoding(rate)
        results.append(_outcome(stage, state, rate, edge))
        batches.append(state.batch)
    return tuple(results), batches[0]


def _rate(stage: _Stage) -> float:
    """Requests per second: what comes, or what the slowest pool lets through; of a closed loop by Little's law."""
    load, replicas = stage.load, stage.decode.deployment.replicas
    most = stage.ceiling
    if load.output_tokens > 1:
        most = min(most, stage.decoding(None).request_rate * replicas)
    if load.concurrency is None:
        return min(most, load.request_rate or most)

    def inside(rate: float) -> float:
        return rate * (stage.prompt_s + stage.moving_s) + replicas * stage.decoding(rate).batch

    if inside(most) <= load.concurrency:
        return most
    low, high = 0.0, most
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if inside(middle) > load.concurrency else (middle, high)
    return low


def _outcome(stage: _Stage, state: SteadyState, rate: float, edge: Edge) -> Outcome:
    load, decodes = stage.load, stage.decode.deployment.replicas
    completed, steps = rate * REFERENCE_S, max(0, load.output_tokens - 1)
    moving_s = stage.moving_s if steps else 0.0
    prefill = scaled(prefill_split(stage.prefill, load.prompt_tokens), completed)
    per_step = decode_split(stage.decode, max(1, round(state.batch)), load.prompt_tokens, steps // 2)
    busy_s = completed * steps * state.step_s / max(state.batch, 1.0)
    decode = scaled(per_step, busy_s / total_seconds(per_step))
    prompts_s, decoding_s = sum(prefill.values()), sum(decode.values())
    givers_s = REFERENCE_S * stage.prefill.deployment.replicas
    pools = (
        PhaseSeconds(prompts_s, 0.0, max(0.0, givers_s - prompts_s)),
        PhaseSeconds(0.0, decoding_s, max(0.0, REFERENCE_S * decodes - decoding_s)),
    )
    tpot_s = state.decode_token_s + moving_s / steps if steps else None
    ttft_s = stage.prompt_s + front_end(stage.prefill.deployment, edge).overhead_s
    return Outcome(
        edge=edge,
        duration_s=REFERENCE_S,
        queue_delay_mean_s=None,
        ttft=mean_only(ttft_s),
        tpot=mean_only(tpot_s),
        itl=mean_only(tpot_s),
        e2el=mean_only(ttft_s + moving_s + steps * state.decode_token_s),
        completed=round(completed),
        good=None,
        input_tokens=round(completed * load.prompt_tokens),
        output_tokens=round(completed * load.output_tokens),
        phases=PhaseSeconds(prompts_s, decoding_s, pools[0].idle_s + pools[1].idle_s),
        prefill=prefill,
        decode=decode,
        pools=pools,
        transfers=_transfers(stage, round(completed) if steps else 0, moving_s),
    )


def _transfers(stage: _Stage, count: int, moving_s: float) -> TransferRecord:
    size_bytes = count * round(stage.kv_bytes * stage.crossing.rules.wire_share)
    ticks = count * seconds_to_ticks(moving_s)
    return TransferRecord(count, size_bytes, size_bytes, ticks, 0, ticks, 0)
