"""Every term of a disaggregated deployment: each pool's, and the transfer between them."""

from __future__ import annotations

from dataclasses import replace

from kvsim.cost.priors import EDGES, Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.step import StepModel
from kvsim.disaggregation import SplitDeployment
from kvsim.explain import Explanation, Term, explain_deployment
from kvsim.sim.disaggregated import Crossing
from kvsim.specs.base import Basis
from kvsim.units import TICKS_PER_SECOND


def explain_split(split: SplitDeployment, prompt_tokens: int, generated_tokens: int, batch: int) -> Explanation:
    """Memory of both pools, one prompt on the one, a decode step on the other, and the prompt's way between them."""
    first = explain_deployment(split.prefill, split.prefill_plan, prompt_tokens, generated_tokens, batch)
    second = explain_deployment(split.decode, split.decode_plan, prompt_tokens, generated_tokens, batch)
    return Explanation(
        title=f"prefill pool: {first.title}; decode pool: {second.title}",
        terms=(
            *(replace(term, name=f"{term.name} (prefill pool)") for term in first.terms if term.phase == "memory"),
            *(replace(term, name=f"{term.name} (decode pool)") for term in second.terms if term.phase == "memory"),
            *(term for term in first.terms if term.phase == "prefill"),
            *_transfer_terms(split, _kv_bytes(split, prompt_tokens)),
            *(term for term in second.terms if term.phase == "decode"),
        ),
        notes=tuple(dict.fromkeys((*split.notes, *first.notes, *second.notes))),
    )


def _kv_bytes(split: SplitDeployment, prompt_tokens: int) -> int:
    """KV of one prompt over the decode side's ranks, in whole blocks."""
    decode = split.decode
    sequences = StepModel(decode, build_rates(decode.device, decode.priors, Edge.CENTRAL)).sequences
    return sequences.profile(prompt_tokens).resident_bytes(0, decode.engine.block_size) * decode.tensor_parallel_size


def _transfer_terms(split: SplitDeployment, kv_bytes: int) -> list[Term]:
    crossings = {edge: split.crossing(edge) for edge in EDGES}
    wire_bytes = kv_bytes * crossings[Edge.CENTRAL].rules.wire_share

    def seconds(name: str, formula: str, values: list[float]) -> Term:
        link = split.link(Edge.CENTRAL)
        return Term("transfer", name, formula, values[0], "s", min(values), max(values), link.basis, link.source)

    setup = [crossing.rules.setup_ticks / TICKS_PER_SECOND for crossing in crossings.values()]
    coder = [kv_bytes * crossing.rules.coder_seconds_per_byte for crossing in crossings.values()]
    terms = [
        Term(
            "transfer",
            "KV of one prompt",
            "bytes on the wire, all ranks",
            wire_bytes,
            "bytes",
            None,
            None,
            Basis.DATASHEET,
            "the strategy's encoded bytes in whole blocks, times the share that compression in transit leaves",
        ),
        seconds("set-up", "posting a transfer + latency", setup),
        seconds(
            "moving",
            "bytes / (min of both ends' ports x nominal rate x efficiency)",
            [wire_bytes / _rate(crossing) for crossing in crossings.values()],
        ),
    ]
    return terms if not coder[0] else [*terms, seconds("coding", "encode before, decode after", coder)]


def _rate(crossing: Crossing) -> float:
    return min(crossing.send_bytes_per_s, crossing.receive_bytes_per_s)
