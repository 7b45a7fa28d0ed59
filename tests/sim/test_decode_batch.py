"""DecodeBatch against sequences that hold their tokens one by one."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvsim.compression.base import growing
from kvsim.compression.selection.cuts import cut_pulses, sawtooth
from kvsim.cost.profile import Growth, Segment, SequenceProfile, after_cuts, merge_priced
from kvsim.sim.batch import DecodeBatch, SequenceState

FIXED_BYTES = 7
UNPACK_SHARE = 3
"""A sequence's unpacking costs this many ticks per attended token, of its whole price."""


@dataclass
class Layers:
    """Some layers of one sequence: a list with one entry per resident token, at most ``cap``."""

    block_bytes: int
    cap: int | None
    tokens: list[int]

    def grow(self) -> None:
        if self.cap is None or len(self.tokens) < self.cap:
            self.tokens.append(len(self.tokens))

    @property
    def rises(self) -> bool:
        return self.cap is None or len(self.tokens) < self.cap

    def held(self, size: int) -> int:
        return len(range(0, len(self.tokens), size)) * self.block_bytes


@dataclass
class Plain:
    """One sequence, token by token."""

    prompt: int
    left: int
    price: int
    window: int | None
    layers: list[Layers]
    state: SequenceState
    fixed_bytes: int
    steps: int = 0
    unpacked: int = field(default=0)

    @property
    def attended(self) -> int:
        """Tokens that the next step reads, its own included."""
        tokens = self.prompt + self.steps + 1
        return tokens if self.window is None else min(tokens, self.window)

    def step(self) -> None:
        self.unpacked += UNPACK_SHARE * self.attended
        self.steps += 1
        self.left -= 1
        for layers in self.layers:
            layers.grow()


def finished(batch: DecodeBatch) -> list[int]:
    """Take those whose last token is out from the finishing order, as the engine does; preempted ones are skipped."""
    order = []
    while batch.finishing and batch.finishing[0][0] <= batch.counter:
        state = heapq.heappop(batch.finishing)[2]
        if state.alive:
            order.append(state.index)
    return order


class DecodeBatchMachine(RuleBasedStateMachine):
    """Join, advance, finish and preempt in any order; all sums stay those of the lists."""

    @initialize(
        size=st.sampled_from((8, 16)), block_bytes=st.integers(1, 5), token_ticks=st.sampled_from((0, 0, 3))
    )  # fmt: skip
    def start(self, size: int, block_bytes: int, token_ticks: int) -> None:
        self.batch = DecodeBatch(size, block_bytes, token_ticks)
        self.plain: dict[int, Plain] = {}
        self.joined = self.unpacked = 0

    @rule(
        prompt=st.integers(1, 40),
        steps=st.integers(1, 60),
        price=st.integers(UNPACK_SHARE, 9),
        window=st.one_of(st.none(), st.integers(1, 50)),
        caps=st.lists(st.one_of(st.none(), st.integers(1, 50)), min_size=1, max_size=3),
        block_bytes=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    )
    def join(
        self, prompt: int, steps: int, price: int, window: int | None, caps: list[int | None], block_bytes: list[int]
    ) -> None:
        state = SequenceState(self.joined, prompt)
        state.held = FIXED_BYTES
        if self.batch.token_ticks:
            price, window, caps, block_bytes = self.batch.token_ticks, None, [None], [self.batch.block_bytes]
        else:
            state.profile = _profile(prompt, price, window, caps, block_bytes)
        layers = [
            Layers(size_bytes, cap, list(range(prompt if cap is None else min(prompt, cap))))
            for cap, size_bytes in zip(caps, block_bytes, strict=False)
        ]
        self.plain[self.joined] = Plain(prompt, steps, price, window, layers, state, FIXED_BYTES)
        self.batch.join(state, steps)
        self.joined += 1

    @precondition(lambda self: self.plain)
    @rule(data=st.data())
    def advance(self, data: st.DataObject) -> None:
        """A run ends where a sequence does, or where a curve bends."""
        most = min(one.left for one in self.plain.values())
        bend = self.batch.steps_until_bend()
        if bend is not None:
            assert bend > 0
            most = min(most, bend)
        steps = data.draw(st.integers(1, most))
        before = self._held()
        for _ in range(steps):
            for one in self.plain.values():
                one.step()
        assert self.batch.advance(steps) == self._held() - before
        self._let_finished_go()

    def _let_finished_go(self) -> None:
        done = {index for index, one in self.plain.items() if not one.left}
        order = finished(self.batch)
        for index in order:
            self._remove(index)
        assert order == sorted(done)

    def _remove(self, index: int) -> None:
        one = self.plain.pop(index)
        size = self.batch.block_size
        assert self.batch.remove(one.state) == sum(layers.held(size) for layers in one.layers) + one.fixed_bytes
        if one.state.profile is not None:
            self.unpacked += one.unpacked

    @precondition(lambda self: self.plain)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self._remove(data.draw(st.sampled_from(sorted(self.plain))))
        self.batch.drop_dead()

    @precondition(lambda self: any(layers.rises for one in self.plain.values() for layers in one.layers))
    @rule(free_bytes=st.integers(0, 120))
    def look_ahead(self, free_bytes: int) -> None:
        """The step after ``steps_until_dry`` is the first that the free bytes do not allow."""
        steps, taken = 0, 0
        while taken + self._due(steps) <= free_bytes:
            taken += self._due(steps)
            steps += 1
        assert self.batch.steps_until_dry(free_bytes) == steps

    def _held(self) -> int:
        return sum(layers.held(self.batch.block_size) for one in self.plain.values() for layers in one.layers)

    def _due(self, ahead: int) -> int:
        """Bytes of new blocks of the step ``ahead`` steps from now, while every curve goes on as it does."""
        size = self.batch.block_size
        return sum(
            layers.block_bytes
            for one in self.plain.values()
            for layers in one.layers
            if layers.rises and (len(layers.tokens) + ahead) % size == 0
        )

    @invariant()
    def sums_are_those_of_the_lists(self) -> None:
        batch = self.batch
        assert batch.size == len(self.plain) == len(batch.active)
        assert list(batch.active) == sorted(self.plain)
        assert batch.variable == sum(one.price * one.attended for one in self.plain.values())
        assert batch.due_bytes() == self._due(0)
        assert batch.unpack_total == self.unpacked


def _profile(
    prompt: int, price: int, window: int | None, caps: list[int | None], block_bytes: list[int]
) -> SequenceProfile:
    """What the cost model would hand out for these curves; decode step j attends to prompt + j + 1 tokens."""
    first = prompt + 1
    if window is not None and first >= window:
        segments = [Segment(0, price * window, 0, UNPACK_SHARE * window, 0)]
    else:
        segments = [Segment(0, price * first, price, UNPACK_SHARE * first, UNPACK_SHARE)]
        if window is not None:
            segments.append(Segment(window - first, price * window, 0, UNPACK_SHARE * window, 0))
    growths = tuple(
        Growth(growing(prompt if cap is None else min(prompt, cap), cap), size_bytes)
        for cap, size_bytes in zip(caps, block_bytes, strict=False)
    )
    return SequenceProfile(tuple(segments), growths, FIXED_BYTES, 0)


DecodeBatchMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestDecodeBatch = DecodeBatchMachine.TestCase


def test_many_steps_at_once_equal_one_by_one() -> None:
    """A run over many cycles of blocks takes what its steps take."""
    long, short = DecodeBatch(16, 5, 2), DecodeBatch(16, 5, 2)
    for batch in (long, short):
        for index, prompt in enumerate((3, 16, 47)):
            batch.join(SequenceState(index, prompt), 1000)
    assert long.advance(777) == sum(short.advance(1) for _ in range(777))
    assert (long.variable, long.due_bytes()) == (short.variable, short.due_bytes())


def test_equal_finishers_leave_in_order_of_joining() -> None:
    batch = DecodeBatch(16, 1, 1)
    for index in (5, 3, 9):
        batch.join(SequenceState(index, 4), 2)
    batch.advance(2)
    assert finished(batch) == [5, 3, 9]


@pytest.mark.parametrize("tokens", [1, 15, 16, 17])
def test_a_block_is_due_when_the_last_one_is_full(tokens: int) -> None:
    batch = DecodeBatch(16, 5, 1)
    batch.join(SequenceState(0, tokens), 100)
    assert batch.due_bytes() == (5 if tokens == 16 else 0)
    assert batch.steps_until_dry(0) == -tokens % 16


# --- caches that are cut back ---------------------------------------------------------------------------------------


@dataclass
class Cut:
    """One sequence whose cache is cut back, token by token."""

    state: SequenceState
    left: int
    tokens: int
    target: int
    interval: int
    price: int
    block_bytes: int
    steps: int = 0
    spent: int = 0

    @property
    def next_ticks(self) -> int:
        """What the next step adds: its tokens, and 5 ticks where it ends with a cut."""
        return self.price * (self.tokens + 1) + (5 if self._cuts(self.steps + 1) else 0)

    def _cuts(self, step: int) -> bool:
        return step % self.interval == 0 and self.tokens + step - self.steps > self.target

    def step(self, size: int) -> tuple[int, int]:
        """Bytes of the block that it needs, if any, and bytes that its cut empties."""
        self.spent += self.next_ticks
        cuts = self._cuts(self.steps + 1)
        due = self.block_bytes if self.tokens % size == 0 else 0
        self.steps += 1
        self.left -= 1
        self.tokens += 1
        if not cuts:
            return due, 0
        before, self.tokens = self.held(size), self.target
        return due, before - self.held(size)

    def held(self, size: int) -> int:
        return -(-self.tokens // size) * self.block_bytes


class CutBatchMachine(RuleBasedStateMachine):
    """Sequences cut back at their own steps join, advance, finish and are preempted; sums stay those of the tokens."""

    @initialize(size=st.sampled_from((1, 8, 16)))
    def start(self, size: int) -> None:
        self.batch = DecodeBatch(size, 0, 0)
        self.plain: dict[int, Cut] = {}
        self.joined = 0

    @rule(
        start=st.integers(0, 40), goal=st.integers(1, 40), interval=st.integers(2, 20), steps=st.integers(1, 120),
        price=st.integers(1, 9), block_bytes=st.integers(1, 5),
    )  # fmt: skip
    def join(self, start: int, goal: int, interval: int, steps: int, price: int, block_bytes: int) -> None:
        curve, pulses = sawtooth(start, goal, interval), cut_pulses(start, goal, interval)
        segments, repeat = merge_priced({curve: (1000 * price, 0), pulses: (5000, 5000)})
        state = SequenceState(self.joined, start)
        state.held = FIXED_BYTES
        state.profile = SequenceProfile(segments, (Growth(after_cuts(curve), block_bytes),), FIXED_BYTES, 0, repeat)
        self.plain[self.joined] = Cut(state, steps, start, goal, interval, price, block_bytes)
        self.batch.join(state, steps)
        self.joined += 1

    @precondition(lambda self: self.plain)
    @rule(data=st.data())
    def advance(self, data: st.DataObject) -> None:
        most = min(one.left for one in self.plain.values())
        bend = self.batch.steps_until_bend()
        steps = data.draw(st.integers(1, most if bend is None else min(most, bend)))
        needed = emptied = 0
        for ahead in range(steps):
            taken = [one.step(self.batch.block_size) for one in self.plain.values()]
            cut = sum(freed for _, freed in taken)
            needed, emptied = needed + sum(due for due, _ in taken), emptied + cut
            assert not cut or ahead == steps - 1, "a run ends where a cache is cut"
        assert self.batch.advance(steps) == needed
        assert self.batch.cut_bytes == emptied
        self.batch.cut_bytes = 0
        for index in finished(self.batch):
            self._remove(index)

    def _remove(self, index: int) -> None:
        one = self.plain.pop(index)
        assert one.spent == one.state.profile.total_ticks(one.steps)[0]
        assert self.batch.remove(one.state) == one.held(self.batch.block_size) + FIXED_BYTES

    @precondition(lambda self: self.plain)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self._remove(data.draw(st.sampled_from(sorted(self.plain))))
        self.batch.drop_dead()

    @invariant()
    def sums_are_those_of_the_tokens(self) -> None:
        size = self.batch.block_size
        assert self.batch.variable == sum(one.next_ticks for one in self.plain.values())
        assert self.batch.due_bytes() == sum(one.block_bytes for one in self.plain.values() if one.tokens % size == 0)
        assert self.batch.growth_total == sum(one.block_bytes for one in self.plain.values())


CutBatchMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCutBatch = CutBatchMachine.TestCase
