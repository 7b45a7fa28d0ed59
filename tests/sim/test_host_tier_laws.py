"""Runs with a host tier lose nothing either: requests, tokens, blocks and seats are conserved."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_invariants import audited, check_run, check_schedulers
from sim_cases import Case, build_case, deploy, shared_tables, talk_tables

from kvsim.units import GIBI, MEBI


@st.composite
def hosted_cases(draw: st.DrawFn) -> Case:
    """Shared prefixes and conversations in a tight pool, beside a host tier of a few blocks or of many."""
    deployment = deploy(
        draw(st.sampled_from(("llama-3.1-8b", "gpt-oss-20b"))),
        draw(st.sampled_from(("native", "fp8", "quest:32", "kivi-4(residual_length=32)"))),
        max_num_batched_tokens=draw(st.sampled_from((8, 24, 64, 512))),
        max_num_seqs=draw(st.sampled_from((1, 3, 8))),
        kv_offloading_size=draw(st.sampled_from((8 * MEBI, 64 * MEBI, GIBI))),
        replicas=draw(st.sampled_from((1, 1, 2))),
        enable_chunked_prefill=draw(st.booleans()),
    )
    return build_case(
        deployment, draw(st.one_of(shared_tables(), talk_tables())), spare_blocks=draw(st.integers(0, 12))
    )


@given(case=hosted_cases())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_laws_hold_with_a_host_tier(case: Case) -> None:
    with audited() as schedulers:
        result = case.play()
    check_run(case, result)
    check_schedulers(schedulers)
