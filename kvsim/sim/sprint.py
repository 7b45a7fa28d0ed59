"""The commonest stretch of a run in one tight loop: prompts that come one at a time, and decoding between them.

Equal to the engine's own loop, step for step; the engine takes over wherever a plan is needed: several prompts at once,
a prompt that does not fit, a pool that may run dry. It holds for a replica without neighbours whose every cached token
costs the same, shares nothing and waits for nothing. All state is in local variables while it lasts: that is why it is
fast.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING

from kvsim.sim.arrivals import NEVER
from kvsim.sim.batch import SequenceState
from kvsim.sim.spans import steps_to_cover, steps_within

if TYPE_CHECKING:
    from kvsim.sim.engine import ReplicaEngine


def sprint(engine: ReplicaEngine, until_ticks: int) -> None:  # noqa: C901, PLR0912, PLR0915 - one loop, no calls: that is its point
    """Play on from the engine's state to about ``until_ticks``, until its scheduler is needed or nothing is left."""
    batch, scheduler, source, tables, record, log = (
        engine.batch, engine.scheduler, engine.source, engine.tables, engine.record, engine.log,
    )  # fmt: skip
    limits, overlaps, work = scheduler.limits, engine.overlaps, engine.host_work
    budget, seats, longest, fixed_bytes = (
        limits.max_num_batched_tokens, limits.max_num_seqs, limits.max_model_len, limits.fixed_bytes,
    )  # fmt: skip
    base, head, step, first_chunk, append = tables.base, tables.head, tables.step, tables.first_chunk, tables.append
    prompt_tokens, output_tokens = scheduler.prompt, scheduler.output
    block_size, block_bytes, token_ticks = batch.block_size, batch.block_bytes, batch.token_ticks
    active, finishing, growth = batch.active, batch.finishing, batch._growth
    size, variable, slope, counter = batch.size, batch.variable, batch.slope, batch.counter
    growth_total, order = batch.growth_total, batch._order
    add_run, add_prompt, decode_steps = record.runs.append, record.prompts.append, engine.decode_steps
    scheduled, first_token, finished, generated = log.scheduled, log.first_token, log.finished, engine.generated
    queue, arrived, position = source.queue, source.arrived_ticks, source.position
    last_position = len(queue)
    next_ticks, now, seen = source.next_ticks, engine.now, engine.seen
    free, min_free, leaving = scheduler.free, record.min_free_bytes, scheduler.leaving
    max_running, variable_total, host_ticks, done = record.max_running, engine.variable_total, record.host_ticks, 0
    returned = 0

    while seen < until_ticks:
        ended, over = now, leaving
        prompt = None
        if next_ticks <= seen:
            index = queue[position]
            if position + 1 < last_position and arrived[queue[position + 1]] <= seen:
                break
            target = prompt_tokens[index]
            tokens = size + target
            held = fixed_bytes + -(-target // block_size) * block_bytes
            running = size + len(leaving)
            if (
                tokens > budget
                or running >= seats
                or target + output_tokens[index] > longest
                or held + growth[counter % block_size] > free
            ):
                break
            free -= held
            scheduled[index] = seen
            if running >= max_running:
                max_running = running + 1
            position += 1
            next_ticks = arrived[queue[position]] if position < last_position else NEVER
            attention, compression = first_chunk[target], append[target]
            ticks = base[tokens] - base[size] + head[size + 1] - head[size]
            if size:
                decode_steps[size] += 1
                variable_total += variable
                ticks += step[size] + variable
            else:
                compression += tables.append_launch
            add_prompt((size, target, 1, attention, compression))
            ticks += attention + compression
            if not overlaps:
                ticks += work[size + 1]
                host_ticks += work[size + 1]
            elif ticks < work[size + 1]:
                host_ticks += work[size + 1] - ticks
                ticks = work[size + 1]
            now += ticks
            leaving = []
            prompt = SequenceState(index, target)
            prompt.held = held
            seen = ended if overlaps else now
            steps = 0
            if size:
                add_run((1, size, ticks, 0))
                steps = 1
        elif size:
            steps = finishing[0][0] - counter
            if growth_total * (steps // block_size + 1) > free:
                break
            if leaving and steps > 1:
                # Only the first step is planned with the blocks of those who end with the running step held.
                due = growth[counter % block_size]
                free -= due
                for _, sequence, held_bytes in leaving:
                    if held_bytes is not None:
                        if free < min_free:
                            min_free = free
                        free += held_bytes
                        returned += held_bytes
                    finished[sequence.index] = ended
                    done += 1
                free += due
                over, leaving = [], []
            first = step[size] + variable
            own_first, own_slope, run_slope, host = first, slope, slope, work[size]
            if host:
                if not overlaps:
                    first += host
                elif first < host:
                    steps = min(steps, steps_within(host - first, slope))
                    first, run_slope = host, 0
            ticks = steps * first + run_slope * (steps * (steps - 1) // 2)
            last = first + run_slope * (steps - 1)
            gap = next_ticks - now
            if ticks > gap:
                if not overlaps:
                    steps, ticks = steps_to_cover(gap, first, run_slope)
                elif ticks - last > gap:
                    steps = 1 + steps_to_cover(gap, first, run_slope)[0] if gap > 0 else 1
                    ticks = steps * first + run_slope * (steps * (steps - 1) // 2)
                    last = first + run_slope * (steps - 1)
            decode_steps[size] += steps
            own = ticks
            if host:
                own = steps * own_first + own_slope * (steps * (steps - 1) // 2)
                host_ticks += ticks - own
            variable_total += own - steps * step[size]
            add_run((steps, size, first, run_slope))
            now += ticks
            seen = now - last if overlaps else now
            leaving = []
        elif seen < now:
            seen = now
            leaving = []
            steps = 0
        elif next_ticks < NEVER:
            now = seen = next_ticks
            continue
        else:
            break

        if steps:
            # Every sequence has gained tokens: their blocks, and who ends.
            start = counter % block_size
            if steps == 1:
                free -= growth[start]
            elif steps < block_size:
                free -= sum(growth[start : start + steps])
            else:
                cycles, rest = divmod(steps, block_size)
                free -= cycles * growth_total + sum(growth[start : start + rest])
            counter += steps
            variable += slope * steps
            while finishing and finishing[0][0] <= counter:
                _, place, sequence = heappop(finishing)
                if not sequence.alive:
                    continue
                gained = counter - sequence.joined
                sequence.alive = False
                del active[sequence.index]
                size -= 1
                variable -= sequence.ticks + token_ticks * gained
                slope -= token_ticks
                phase = (sequence.joined - sequence.target) % block_size
                growth[phase] -= block_bytes
                growth[phase + block_size] -= block_bytes
                growth_total -= block_bytes
                held = -(-(sequence.target + gained) // block_size) * block_bytes + sequence.held
                leaving.append((place, sequence, held))
        if prompt is not None:
            first_token[index] = now
            generated[index] = 1
            left = output_tokens[index] - 1
            order += 1
            if left:
                prompt.held = fixed_bytes
                prompt.order = order
                prompt.joined = counter
                prompt.finish = counter + left
                prompt.slope = token_ticks
                prompt.ticks = token_ticks * (target + 1)
                phase = (counter - target) % block_size
                growth[phase] += block_bytes
                growth[phase + block_size] += block_bytes
                growth_total += block_bytes
                heappush(finishing, (prompt.finish, order, prompt))
                active[index] = prompt
                size += 1
                variable += prompt.ticks
                slope += token_ticks
            else:
                leaving.append((order, prompt, prompt.held))
        if not overlaps:
            over, leaving, ended = leaving, [], now
        for _, sequence, held_bytes in over:
            if held_bytes is not None:
                if free < min_free:
                    min_free = free
                free += held_bytes
                returned += held_bytes
            finished[sequence.index] = ended
            done += 1

    batch.size, batch.variable, batch.slope, batch.counter = size, variable, slope, counter
    batch.growth_total, batch._order = growth_total, order
    engine.now, engine.seen, engine.variable_total = now, seen, variable_total
    engine.load -= done
    record.min_free_bytes, record.max_running, record.host_ticks = min_free, max_running, host_ticks
    scheduler.free, scheduler.leaving = free, leaving
    scheduler.note_returned(returned)
    if position > source.position:
        record.max_waiting = max(record.max_waiting, 1)
    source.go_to(position)
