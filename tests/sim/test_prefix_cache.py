"""The prefix cache against a naive one, and what it does for conversations."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from run_invariants import audited, check_run, check_schedulers
from sim_cases import HASH_TOKENS, MS, Case, base_deployment, build_case, deploy, table

from kvsim.errors import InvariantViolation
from kvsim.prepare import prepare
from kvsim.requests import UNSCHEDULED
from kvsim.scenario import Scenario
from kvsim.sim.prefix_cache import PrefixCache
from kvsim.sim.run import RunResult
from kvsim.specs.engine import EngineSpec


class PrefixCacheMachine(RuleBasedStateMachine):
    """Naive model: a list of [hash, users, last use] rows, searched from end to end."""

    @initialize(unit_bytes=st.integers(1, 4))
    def start(self, unit_bytes: int) -> None:
        self.cache = PrefixCache(unit_bytes)
        self.unit_bytes = unit_bytes
        self.rows: list[list[int]] = []
        self.held: list[list[int]] = []
        self.clock = 0

    def _row(self, value: int) -> list[int] | None:
        return next((row for row in self.rows if row[0] == value), None)

    def _match(self, hashes: list[int], most: int) -> int:
        count = 0
        while count < min(most, len(hashes)) and self._row(hashes[count]) is not None:
            count += 1
        return count

    @rule(hashes=st.lists(st.integers(0, 12), unique=True, max_size=6), most=st.integers(0, 6))
    def take(self, hashes: list[int], most: int) -> None:
        """What a request does: match, count what it takes from the free units, pin, compute and insert the rest."""
        matched = self.cache.match(hashes, most)
        assert matched == self._match(hashes, most)
        found = hashes[:matched]
        rows = [row for value in found if (row := self._row(value)) is not None]
        assert self.cache.unused_among(found) == sum(1 for row in rows if not row[1])
        self.cache.pin(found)
        for row in rows:
            row[1] += 1
        mine = list(found)
        for value in hashes[matched:]:
            known = self._row(value) is not None
            assert self.cache.insert(value) is not known
            if known:
                break
            self.rows.append([value, 1, 0])
            mine.append(value)
        self.held.append(mine)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        mine = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        freed = 0
        for value in reversed(mine):
            row = self._row(value)
            assert row is not None
            row[1] -= 1
            if not row[1]:
                self.clock += 1
                row[2] = self.clock
                freed += 1
        assert self.cache.unpin(mine) == freed

    @rule(limit_bytes=st.integers(0, 30))
    def evict(self, limit_bytes: int) -> None:
        unused = sorted((row for row in self.rows if not row[1]), key=lambda row: row[2])
        while len(unused) * self.unit_bytes > limit_bytes:
            self.rows.remove(unused.pop(0))
        self.cache.evict_until(limit_bytes)

    @invariant()
    def same_contents(self) -> None:
        for value in range(13):
            assert self.cache.match([value], 1) == (self._row(value) is not None)
        unused = sum(1 for row in self.rows if not row[1])
        assert self.cache.evictable_bytes == unused * self.unit_bytes
        assert self.cache.pinned_units == len(self.rows) - unused


PrefixCacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPrefixCache = PrefixCacheMachine.TestCase


def test_a_unit_released_too_often_is_a_bug() -> None:
    cache = PrefixCache(1)
    cache.insert(7)
    cache.unpin([7])
    with pytest.raises(InvariantViolation, match="unit 7 was released more often"):
        cache.unpin([7])


# --- conversations --------------------------------------------------------------------------------------------------

FIRST, ANSWER, NEW = 100, 60, 25


def conversation(strategy: str = "native", *, spare_blocks: int = 10_000, hashed: bool = True) -> Case:
    """Two turns; the second repeats the first with its answer, and adds a message."""
    second = FIRST + ANSWER + NEW
    known = (FIRST + ANSWER - 1) // HASH_TOKENS
    ids = tuple(range(second // HASH_TOKENS))
    requests = table(
        [0, UNSCHEDULED], [FIRST, second], [ANSWER, 10], parents=[-1, 0], delays=[0, 50 * MS],
        hashes=(ids[: FIRST // HASH_TOKENS], ids) if hashed else None,
        output_hashes=(ids[FIRST // HASH_TOKENS : known], ()) if hashed else None,
    )  # fmt: skip
    return build_case(deploy(strategy=strategy, max_num_batched_tokens=512), requests, spare_blocks=spare_blocks)


def play(case: Case) -> RunResult:
    with audited() as schedulers:
        result = case.play()
    check_run(case, result)
    check_schedulers(schedulers)
    return result


def test_the_second_turn_finds_the_first_one_and_its_answer() -> None:
    """All full blocks of prompt and answer but the newest token, which has no KV yet."""
    (record,) = play(conversation()).records
    expected = (FIRST + ANSWER - 1) // HASH_TOKENS * HASH_TOKENS
    assert record.cached_prompt_tokens == expected
    assert record.prefilled_tokens == FIRST + (FIRST + ANSWER + NEW) - expected


def test_a_hit_shortens_the_second_turn_only() -> None:
    hit, miss = play(conversation()).log, play(conversation(hashed=False)).log
    assert hit.first_token[0] == miss.first_token[0]
    assert hit.first_token[1] - hit.arrived[1] < miss.first_token[1] - miss.arrived[1]


def test_an_identical_prompt_still_computes_its_last_block() -> None:
    """A fully cached prompt leaves nothing to sample from, so at least one token is computed."""
    requests = table([0, 900 * MS], [64, 64], [2, 2], hashes=((1, 2, 3, 4), (1, 2, 3, 4)))
    (record,) = play(build_case(deploy(), requests)).records
    assert record.cached_prompt_tokens == 64 - HASH_TOKENS
    assert record.prefilled_tokens == 64 + HASH_TOKENS


def test_equal_prompts_at_once_are_each_computed() -> None:
    """Blocks are found once they are computed, not while (vLLM caches a block when its step is scheduled to end)."""
    requests = table([0, 0], [64, 64], [2, 2], hashes=((1, 2, 3, 4), (1, 2, 3, 4)))
    (record,) = play(build_case(deploy(), requests)).records
    assert record.cached_prompt_tokens == 0


def test_the_least_recently_used_prefix_makes_way() -> None:
    """Three prompts in a pool for two: the oldest is forgotten, from its end, the others are found again."""
    size = 10 * HASH_TOKENS
    ids = [tuple(100 * k + i for i in range(10)) for k in range(3)]
    gap = 900 * MS
    order = [0, 1, 2, 1, 0]
    requests = table(
        [gap * i for i in range(5)], [size + 1] * 5, [2] * 5, hashes=tuple(ids[k] for k in order)
    )  # fmt: skip
    # A request takes 11 blocks; 24 hold one and 13 unused units.
    case = build_case(deploy(max_num_batched_tokens=512), requests, spare_blocks=13)
    assert case.plan.num_blocks == 24
    (record,) = play(case).records
    # The third prompt takes 11 of 24 blocks, so 7 of the 20 units in the cache go: the end of the first prompt. The
    # fourth request finds all ten units of the second prompt, the fifth the first three of its own.
    assert record.cached_prompt_tokens == (10 + 3) * HASH_TOKENS
    ample = play(build_case(deploy(max_num_batched_tokens=512), requests)).records[0]
    assert ample.cached_prompt_tokens == (10 + 10) * HASH_TOKENS


@pytest.mark.parametrize("strategy", ["snapkv:0.5", "h2o:0.5", "streaming_llm:64"])
def test_strategies_that_throw_tokens_away_share_nothing(strategy: str) -> None:
    (record,) = play(conversation(strategy)).records
    assert record.cached_prompt_tokens == 0


@pytest.mark.parametrize("strategy", ["fp8", "quest:64", "kivi-4(residual_length=32)"])
def test_strategies_that_keep_every_token_share_prefixes(strategy: str) -> None:
    (record,) = play(conversation(strategy)).records
    assert record.cached_prompt_tokens > 0


def test_prefix_caching_can_be_switched_off() -> None:
    deployment = base_deployment("llama-3.1-8b", "native", EngineSpec(enable_prefix_caching=False))
    (record,) = play(build_case(deployment, conversation().requests)).records
    assert record.cached_prompt_tokens == 0


def shared_scenario(strategy: str) -> Scenario:
    return Scenario.model_validate(
        {
            "model": "llama-3.1-8b", "device": "h100-sxm", "compression": strategy, "bands": False,
            "workload": {
                "kind": "synthetic", "num_prompts": 5, "input_len": {"kind": "constant", "tokens": 50},
                "output_len": {"kind": "constant", "tokens": 5}, "shared_prefix_tokens": 200,
                "arrivals": {"kind": "constant", "request_rate": 1.0},
            },
        }
    )  # fmt: skip


def test_a_reader_is_told_that_eviction_switches_prefix_caching_off() -> None:
    assert any("prefix cach" in note.lower() for note in prepare(shared_scenario("snapkv:0.5")).notes)
    assert not any("prefix cach" in note.lower() for note in prepare(shared_scenario("native")).notes)
