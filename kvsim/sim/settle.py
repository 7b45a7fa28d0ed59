"""After a run: where each replica's busy time went, and whether anything was lost on the way."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvsim.cost.tables import StepTables
from kvsim.errors import InvariantViolation
from kvsim.requests import RequestTable
from kvsim.sim.engine import ReplicaEngine
from kvsim.sim.recorder import PhaseTicks, ReplicaRecord, RequestLog
from kvsim.sim.speculative_batch import SpeculativeBatch


def settle_replica(replica: ReplicaEngine) -> None:
    """Divide a replica's busy time by component, and check that it has nothing left."""
    _split_prompt_time(replica.record, replica.tables)
    _split_decode_time(replica, replica.tables)
    _check_replica(replica)


def _split_prompt_time(record: ReplicaRecord, tables: StepTables) -> None:
    """Divide what prompts added to steps by component: differences of the tables the steps were priced from."""
    if not record.prompts:
        return
    size, tokens, ending, attention, compression = record.prompts.table().T

    rows = size * tables.rows

    def added(table: list[int], extra: npt.NDArray[np.int64]) -> int:
        values = np.array(table, dtype=np.int64)
        return int((values[rows + extra] - values[rows]).sum())

    record.prefill = PhaseTicks(
        weights=added(tables.weights, tokens)
        + added(tables.head, ending)
        - added(tables.gather, ending)
        - added(tables.sampling, ending),
        attention=int(attention.sum()),
        compression=int(compression.sum()) + record.aside_ticks,
        communication=added(tables.communication, tokens) + added(tables.gather, ending),
        overhead=added(tables.overhead, tokens) + added(tables.sampling, ending),
    )


def _split_decode_time(replica: ReplicaEngine, tables: StepTables) -> None:
    """Divide the decode steps' time by component from the counts per batch size."""
    decode = PhaseTicks()
    parallel = replica.step.deployment.parallelism
    for batch, steps in enumerate(replica.decode_steps):
        if steps:
            sequences = parallel.sequences_per_lane(batch)
            rows = sequences * tables.rows
            gather, sampling = tables.gather[rows], tables.sampling[rows]
            decode.weights += steps * (tables.weights[rows] + tables.head[rows] - gather - sampling)
            decode.communication += steps * (tables.communication[rows] + gather)
            decode.overhead += steps * (tables.overhead[rows] + sampling)
            decode.attention += steps * tables.attention_fixed[sequences]
            decode.compression += steps * tables.compression_fixed[sequences]
    drafting = _split_drafting(replica, tables, decode)
    unpack = replica.compression_ticks(drafting)
    decode.compression += unpack
    decode.attention += replica.variable_total - unpack
    decode.overhead += replica.record.host_ticks
    replica.record.decode = decode


def _split_drafting(replica: ReplicaEngine, tables: StepTables, decode: PhaseTicks) -> int:
    """Divide the drafters' passes after the first likewise; ticks that drafting took for contexts."""
    batch, record, drafting = replica.batch, replica.record, tables.drafting
    if not isinstance(batch, SpeculativeBatch):
        return 0
    record.verifications, record.verified_tokens = batch.verifications, batch.tokens_out
    record.drafting_ticks = batch.draft_total
    for sequences, steps in enumerate(replica.decode_steps):
        if steps and drafting is not None:
            decode.weights += steps * drafting.weights[sequences]
            decode.communication += steps * drafting.communication[sequences]
            decode.overhead += steps * drafting.overhead[sequences]
            decode.attention += steps * drafting.attention[sequences]
            record.drafting_ticks += steps * drafting.whole[sequences]
    return batch.draft_total


def _check_replica(replica: ReplicaEngine) -> None:
    """Blocks and sequences are conserved: an idle replica has every byte back and nothing left to do."""
    scheduler, batch = replica.scheduler, replica.batch
    left = {
        "sequences": batch.size,
        "waiting requests": len(scheduler.waiting),
        "sequences that wait beside the steps": len(replica.waits) + len(scheduler.loaded),
        "prompts in progress": len(scheduler.prefilling),
        "missing pool bytes": scheduler.limits.pool_bytes - scheduler.free,
        "ticks of decode work": batch.variable,
        "bytes of pending growth": batch.growth_total,
    }
    if scheduler.sharing is not None and scheduler.sharing.tiers is not None:
        left |= scheduler.sharing.tiers.unfinished()
    wrong = {name: amount for name, amount in left.items() if amount}
    if wrong:
        msg = f"a replica ended with {wrong}"
        raise InvariantViolation(msg)


def check_requests(log: RequestLog, requests: RequestTable) -> None:
    """Every request ended exactly one way, and its life ran forward."""
    for index in range(len(requests)):
        arrived, scheduled = log.arrived[index], log.scheduled[index]
        first, finished = log.first_token[index], log.finished[index]
        if log.rejected[index]:
            if finished >= 0:
                msg = f"request {index} was rejected and finished"
                raise InvariantViolation(msg)
        elif not 0 <= arrived <= scheduled <= first <= finished:
            msg = f"request {index} ran backwards: {arrived=} {scheduled=} {first=} {finished=}"
            raise InvariantViolation(msg)
