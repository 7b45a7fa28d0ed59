"""Requests drawn from distributions: single requests, or sessions of several turns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvsim.errors import InvalidSpec
from kvsim.requests import UNSCHEDULED, IntArray, RequestTable
from kvsim.specs.workload import Conversations, SyntheticWorkload
from kvsim.traces.rows import MAX_REQUEST_TOKENS, MAX_TRACE_ROWS
from kvsim.workloads.arrivals import Schedule, generate, to_ticks
from kvsim.workloads.classes import draw_classes, own_lengths, priorities
from kvsim.workloads.lengths import draw_lengths
from kvsim.workloads.prefixes import session_hashes, shared_hashes
from kvsim.workloads.streams import stream


@dataclass(frozen=True, eq=False)
class _Turns:
    """Rows in order of session, then turn; lists of length num_requests."""

    session: list[int]
    prompt_tokens: list[int]
    first: list[bool]


def build_synthetic(workload: SyntheticWorkload, seed: int) -> RequestTable:
    """Draw the requests; raise InvalidSpec where the sizes pass the caps."""
    count = workload.num_prompts
    if count > MAX_TRACE_ROWS:
        msg = f"workload: num_prompts: {count} is not allowed; at most {MAX_TRACE_ROWS}"
        raise InvalidSpec(msg)
    messages = draw_lengths(workload.input_len, count, stream(seed, "input_len"), "input_len")
    outputs = draw_lengths(workload.output_len, count, stream(seed, "output_len"), "output_len")
    drawn = draw_classes(workload.classes, count, seed)
    if workload.shared_prefix_tokens > MAX_REQUEST_TOKENS:
        msg = f"workload: shared_prefix_tokens: {workload.shared_prefix_tokens} is not allowed; at most {2**31}"
        raise InvalidSpec(msg)
    if workload.conversations is not None:
        return _sessions(workload, workload.conversations, seed, messages, outputs, drawn)
    if drawn is not None:
        messages, outputs = own_lengths(workload.classes, drawn, seed, messages, outputs)
    return _single_requests(workload, seed, messages, outputs, drawn)


def _single_requests(
    workload: SyntheticWorkload, seed: int, messages: IntArray, outputs: IntArray, drawn: IntArray | None
) -> RequestTable:
    count = len(messages)
    schedule = generate(workload.arrivals, count, stream(seed, "arrivals"), items_per_request=1.0)
    hashes = None
    if workload.shared_prefix_tokens:
        choice = _prefix_choice(workload, seed, count)
        hashes = shared_hashes(choice, workload.shared_prefix_tokens, workload.num_shared_prefixes)
    return RequestTable(
        arrival_ticks=schedule.arrival_ticks,
        prompt_tokens=messages + workload.shared_prefix_tokens,
        output_tokens=outputs,
        delay_ticks=schedule.delay_ticks,
        parent=schedule.parent,
        prefix_hashes=hashes,
        priority=priorities(workload.classes, drawn),
        request_class=drawn,
        class_names=tuple(one.name for one in workload.classes),
        source=_source(workload, seed),
        notes=_notes(workload),
    )


def _sessions(
    workload: SyntheticWorkload,
    talk: Conversations,
    seed: int,
    messages: IntArray,
    outputs: IntArray,
    drawn: IntArray | None,
) -> RequestTable:
    """Build a table of sessions: ``request_rate`` still counts requests, so sessions start at rate / mean turns."""
    count = len(messages)
    turns = _lay_out_turns(workload, talk, seed, messages, outputs)
    num_sessions = turns.session[-1] + 1
    schedule = generate(
        workload.arrivals, num_sessions, stream(seed, "arrivals"), items_per_request=num_sessions / count
    )
    first = np.array(turns.first)
    think_s = talk.think_time_s * stream(seed, "think_time").standard_exponential(count)
    arrival_ticks, parent, delay_ticks = _chain_turns(schedule, first, to_ticks(think_s, "think times"))
    prompts = np.array(turns.prompt_tokens, dtype=np.int64)
    prefixes, answers = session_hashes(
        turns.session,
        turns.prompt_tokens,
        outputs.tolist(),
        _prefix_choice(workload, seed, num_sessions).tolist(),
        workload.shared_prefix_tokens,
        workload.num_shared_prefixes,
    )
    by_session = None if drawn is None else drawn[np.array(turns.session, dtype=np.int64)]
    mean_turns = f"{num_sessions} sessions of {count / num_sessions:.2f} turns in the mean"
    return RequestTable(
        arrival_ticks=arrival_ticks,
        prompt_tokens=prompts,
        output_tokens=outputs,
        delay_ticks=delay_ticks,
        parent=parent,
        prefix_hashes=prefixes,
        output_hashes=answers,
        priority=priorities(workload.classes, by_session),
        request_class=by_session,
        class_names=tuple(one.name for one in workload.classes),
        source=_source(workload, seed),
        notes=(*_notes(workload), mean_turns),
    )


def _lay_out_turns(
    workload: SyntheticWorkload, talk: Conversations, seed: int, messages: IntArray, outputs: IntArray
) -> _Turns:
    count = len(messages)
    num_turns = draw_lengths(talk.turns, count, stream(seed, "turns"), "conversations.turns").tolist()
    openings = messages
    if talk.first_input_len is not None:
        rng = stream(seed, "first_input_len")
        openings = draw_lengths(talk.first_input_len, count, rng, "conversations.first_input_len")
    limit = talk.max_context_tokens or MAX_REQUEST_TOKENS
    opening, message, output = openings.tolist(), messages.tolist(), outputs.tolist()
    turns = _Turns([], [], [])
    session = turn = context = 0
    for row in range(count):
        if turn and (turn == num_turns[session] or context + message[row] + output[row] > limit):
            session, turn = session + 1, 0
        if turn == 0:
            context = workload.shared_prefix_tokens
        context += opening[row] if turn == 0 else message[row]
        turns.session.append(session)
        turns.prompt_tokens.append(context)
        turns.first.append(turn == 0)
        context += output[row]
        turn += 1
    return turns


def _chain_turns(schedule: Schedule, first: np.typing.NDArray[np.bool_], think_ticks: IntArray) -> tuple[IntArray, ...]:
    """Give (arrival_ticks, parent, delay_ticks) per row: later turns follow the row before, first turns the schedule.

    In a closed loop a session's first turn follows the last turn of its client's session before.
    """
    session = np.cumsum(first) - 1
    last_row = np.append(np.flatnonzero(first)[1:], len(first)) - 1
    before = schedule.parent[session]
    parent = np.where(first, np.where(before >= 0, last_row[before], -1), np.arange(len(first)) - 1)
    arrival_ticks = np.where(first, schedule.arrival_ticks[session], UNSCHEDULED)
    delay_ticks = np.where(first, schedule.delay_ticks[session], think_ticks)
    return arrival_ticks, parent, delay_ticks


def _prefix_choice(workload: SyntheticWorkload, seed: int, count: int) -> IntArray:
    rng = stream(seed, "shared_prefix_choice")
    return rng.integers(workload.num_shared_prefixes, size=count, dtype=np.int64)


def _source(workload: SyntheticWorkload, seed: int) -> str:
    shape = "sessions of turns, " if workload.conversations is not None else ""
    return (
        f"synthetic: {shape}input_len {workload.input_len.kind}, output_len {workload.output_len.kind}, "
        f"{workload.arrivals.kind} arrivals, {workload.num_prompts} requests, seed {seed}"
    )


def _notes(workload: SyntheticWorkload) -> tuple[str, ...]:
    return () if workload.fitted_from is None else (f"lengths fitted from {workload.fitted_from}",)
