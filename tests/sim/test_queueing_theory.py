"""One seat makes a replica a single-server queue, whose waits theory knows.

Every interval is a two-sided 99 % confidence interval of the mean wait from independent replications of one seed each
(Student's t, 11 degrees of freedom), each replication after a warm-up that is thrown away.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from sim_cases import Case, build_case, busy_ticks, deploy, step_model, table

from kvsim.closed_form import decode_split, prefill_split, total_seconds
from kvsim.sim.run import RunResult
from kvsim.units import TICKS_PER_SECOND

REPLICATIONS = 12
T_99 = 3.106
"""Student's t, 0.995 quantile, 11 degrees of freedom."""
REQUESTS, WARM_UP = 4000, 500
PROMPT = 8
Array = np.typing.NDArray[np.float64]


@lru_cache(maxsize=1)
def service_table(most: int) -> Array:
    """Service time in seconds of an answer of n tokens alone, n = 0..most; the first two entries are 0 and prefill."""
    step = step_model(deploy(max_num_seqs=1))
    first_s = total_seconds(prefill_split(step, PROMPT))
    start_s, later_s = (total_seconds(decode_split(step, 1, PROMPT, g)) for g in (0, 1000))
    # A lone decode step is linear in the context.
    steps = np.arange(most - 1)
    step_s = start_s + (later_s - start_s) / 1000 * steps
    return np.concatenate([[0.0, first_s], first_s + np.cumsum(step_s)])


MOST = 4000


def single_server(outputs: np.typing.NDArray[np.int64], arrivals_s: Array) -> Case:
    ticks = np.rint(arrivals_s * TICKS_PER_SECOND).astype(np.int64)
    requests = table(ticks.tolist(), [PROMPT] * len(outputs), outputs.tolist())
    return build_case(deploy(max_num_seqs=1), requests, spare_blocks=100)


def waits_s(result: RunResult) -> Array:
    log = result.log
    return (np.array(log.scheduled) - np.array(log.arrived)) / TICKS_PER_SECOND


def draw_outputs(kind: str, rng: np.random.Generator, count: int) -> np.typing.NDArray[np.int64]:
    if kind == "constant":
        return np.full(count, 200, dtype=np.int64)
    if kind == "exponential":
        # The answer whose service time is nearest to an exponential draw: discrete, but 200 steps a mean.
        service_s = service_table(MOST)
        draws = rng.exponential(service_s[200], count)
        return np.clip(np.searchsorted(service_s, draws), 1, MOST).astype(np.int64)
    if kind == "two_point":
        return np.where(rng.random(count) < 0.9, 50, 1550).astype(np.int64)
    return np.clip(np.rint(rng.lognormal(np.log(120), 0.8, count)), 1, MOST).astype(np.int64)


@lru_cache(maxsize=32)
def mean_and_half_width(kind: str, utilization: float) -> tuple[float, float]:
    """Mean wait in seconds over the replications, and half its 99 % interval."""
    means = []
    for replication in range(REPLICATIONS):
        rng = np.random.default_rng([replication, 2024])
        outputs = draw_outputs(kind, rng, REQUESTS)
        arrivals_s = np.cumsum(rng.exponential(moments(kind)[0] / utilization, REQUESTS))
        means.append(float(waits_s(single_server(outputs, arrivals_s).play())[WARM_UP:].mean()))
    return float(np.mean(means)), T_99 * float(np.std(means, ddof=1)) / REPLICATIONS**0.5


@lru_cache(maxsize=8)
def moments(kind: str) -> tuple[float, float]:
    """First two moments of the service time, from 200,000 draws of the length through the closed form."""
    service_s = service_table(MOST)[draw_outputs(kind, np.random.default_rng(1), 200_000)]
    return float(service_s.mean()), float((service_s**2).mean())


def pollaczek_khinchine_s(mean_s: float, second_s2: float, utilization: float) -> float:
    """Mean wait of M/G/1: λ·E[S²] / (2·(1 - utilization))."""
    return utilization / mean_s * second_s2 / (2 * (1 - utilization))


@pytest.mark.parametrize("utilization", [0.3, 0.6, 0.8])
def test_m_d_1(utilization: float) -> None:
    """Constant answers: wait = utilization·S / (2·(1 - utilization))."""
    service_s = float(service_table(MOST)[200])
    mean_s, half_s = mean_and_half_width("constant", utilization)
    expected_s = utilization * service_s / (2 * (1 - utilization))
    assert half_s < 0.15 * expected_s
    assert abs(mean_s - expected_s) < half_s


@pytest.mark.parametrize("utilization", [0.3, 0.6])
def test_m_m_1(utilization: float) -> None:
    """Exponential service: wait = utilization·E[S] / (1 - utilization)."""
    mean_s, half_s = mean_and_half_width("exponential", utilization)
    expected_s = utilization * float(service_table(MOST)[200]) / (1 - utilization)
    assert half_s < 0.15 * expected_s
    assert abs(mean_s - expected_s) < half_s + 0.01 * expected_s  # service is rounded up to whole tokens


@pytest.mark.parametrize("kind", ["two_point", "lognormal"])
@pytest.mark.parametrize("utilization", [0.3, 0.6])
def test_m_g_1(kind: str, utilization: float) -> None:
    """Pollaczek-Khinchine with the moments of the service times that the step model gives."""
    mean_s, half_s = mean_and_half_width(kind, utilization)
    expected_s = pollaczek_khinchine_s(*moments(kind), utilization)
    assert half_s < 0.25 * expected_s
    assert abs(mean_s - expected_s) < half_s


def test_variable_answers_wait_longer_than_constant_ones() -> None:
    """Same load, more variance: at 0.6 load exponential answers wait about twice as long (M/M/1 against M/D/1)."""
    constant_s, _ = mean_and_half_width("constant", 0.6)
    exponential_s, _ = mean_and_half_width("exponential", 0.6)
    assert 1.7 < exponential_s / constant_s < 2.3


# --- laws that hold on every sample path ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample() -> tuple[Case, RunResult]:
    rng = np.random.default_rng(7)
    outputs = draw_outputs("lognormal", rng, 2000)
    mean_s = float(service_table(MOST)[outputs].mean())
    case = single_server(outputs, np.cumsum(rng.exponential(mean_s / 0.8, len(outputs))))
    return case, case.play()


def test_lindley_recursion_to_the_tick(sample: tuple[Case, RunResult]) -> None:
    """W[n+1] = max(0, W[n] + S[n] - A[n]), with the service times the run itself took."""
    log = sample[1].log
    wait = 0
    for n in range(len(log.arrived) - 1):
        assert log.scheduled[n] - log.arrived[n] == wait
        service = log.finished[n] - log.scheduled[n]
        wait = max(0, wait + service - (log.arrived[n + 1] - log.arrived[n]))


def test_service_times_are_those_of_the_closed_form(sample: tuple[Case, RunResult]) -> None:
    case, result = sample
    took_s = (np.array(result.log.finished) - np.array(result.log.scheduled)) / TICKS_PER_SECOND
    np.testing.assert_allclose(took_s, service_table(MOST)[case.requests.output_tokens], rtol=1e-6)


def test_littles_law_of_the_system(sample: tuple[Case, RunResult]) -> None:
    """L = λW to the tick: the area under the number in system, event by event, is the sum of the sojourns."""
    log = sample[1].log
    events = sorted([(t, 1) for t in log.arrived] + [(t, -1) for t in log.finished])
    area = present = 0
    before = 0
    for now, change in events:
        area += present * (now - before)
        present, before = present + change, now
    assert present == 0
    assert area == sum(f - a for f, a in zip(log.finished, log.arrived, strict=True))


def test_littles_law_of_the_decode_stage(sample: tuple[Case, RunResult]) -> None:
    """The batch sizes the engine wrote down and the tokens' times that the log holds are two views of one area."""
    result = sample[1]
    (record,) = result.records
    area = sum(size * (steps * first + slope * (steps * (steps - 1) // 2)) for steps, size, first, slope in record.runs)
    log = result.log
    assert not record.gaps
    assert area == sum(f - t for f, t in zip(log.finished, log.first_token, strict=True))


def test_utilization_law(sample: tuple[Case, RunResult]) -> None:
    """Busy time is the sum of service times: utilization = λ·E[S], to the tick."""
    log = sample[1].log
    assert busy_ticks(sample[1]) == [sum(f - s for f, s in zip(log.finished, log.scheduled, strict=True))]
