"""Seconds of what ranks exchange in a step, by size and topology.

A group of ranks that fits the scale-up domain talks over its links alone. A larger one does in two levels: within each
domain, and between domains, where every device has a network port of its own (NCCL's hierarchical rings).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.cost.calibrated import all_reduce_tables
from kvsim.cost.kernels import all_reduce_kernel
from kvsim.cost.rates import Rates
from kvsim.deployment import Deployment
from kvsim.ops import Numeric
from kvsim.specs.base import DTYPE_BITS
from kvsim.specs.model import LayerKind

LOGIT_BYTES = 2.0
"""The LM head's output is gathered in the model's 16-bit dtype."""
PASSED_TENSORS = 2
"""Hidden states and residual, which vLLM passes from one stage to the next."""
FP8_AND_HALF = 1.5
"""Bytes sent and received of a hidden element, over its size in 16 bits: 8 bits out, 16 back."""
ALL_REDUCE, GATHER = 2.0, 1.0
"""How often a collective moves its message over the links: reduce-scatter and all-gather, or one of them."""


def collective_seconds(size_bytes: Numeric, ranks: int, rates: Rates, *, passes: float, latency_s: float) -> Numeric:
    """Latency + passes·(n-1)/n of the message over one direction of the slowest level's links.

    Ranks without a link of their own share the host's: n/2 pairs talk over it at once.
    """
    if ranks == 1 or rates.link_bytes_per_s is None:
        return size_bytes * 0.0
    inside = min(ranks, rates.domain_devices)
    pairs_on_link = inside / 2.0 if rates.link_is_shared else 1.0
    seconds = latency_s + passes * (inside - 1) / inside * size_bytes * pairs_on_link / rates.link_bytes_per_s
    domains = -(-ranks // rates.domain_devices)
    if domains > 1:
        # Each device carries its domain's share of the message to the other domains.
        across = passes * (domains - 1) / domains * size_bytes / inside
        seconds = seconds + rates.node_latency_s + across / rates.node_link_bytes_per_s
    return seconds


def all_reduce_seconds(size_bytes: Numeric, ranks: int, rates: Rates) -> Numeric:
    """Ring all-reduce: latency + 2·(n-1)/n of the message over one direction of the link."""
    return collective_seconds(size_bytes, ranks, rates, passes=ALL_REDUCE, latency_s=rates.all_reduce_latency_s)


def gather_seconds(gathered_bytes: Numeric, ranks: int, rates: Rates) -> Numeric:
    """All-gather to ``gathered_bytes`` on every rank, or the reduce-scatter of as much."""
    return collective_seconds(gathered_bytes, ranks, rates, passes=GATHER, latency_s=rates.gather_latency_s)


@dataclass(frozen=True)
class Exchange:
    """Tokens to experts on other data parallel ranks and back, by one all-to-all library."""

    latency_s: float
    bytes_per_s: float
    bytes_per_row: float

    def seconds(self, rows: Numeric) -> Numeric:
        """Dispatch and combine of one layer for ``rows`` tokens of each rank."""
        return self.latency_s + rows * self.bytes_per_row / self.bytes_per_s


class StepCommunication:
    """What one turn of a deployment's ranks exchanges."""

    def __init__(self, deployment: Deployment, rates: Rates) -> None:
        model, self._parallel, self._rates = deployment.model, deployment.parallelism, rates
        ranks = self._parallel.tensor
        self._hidden_bytes = model.hidden_size * DTYPE_BITS[model.dtype] / 8
        kinds = [group.kind for group in model.groups for _ in group.layers]
        # One all-reduce per block: two where attention and MLP share a layer, one where each is a layer.
        self._all_reduces = len(kinds) * (1 if LayerKind.MLP in kinds else 2)
        self._stretch = self._parallel.turn_stretch(len(kinds))
        reduce = all_reduce_kernel(deployment)
        self._table = all_reduce_tables(reduce, ranks, self._hidden_bytes)[rates.edge] if reduce else None
        self._exchanges = len(model.moe.layers) if model.moe is not None and self._parallel.data > 1 else 0
        self._backend = deployment.engine.all2all_backend
        self._top_k = model.moe.num_experts_per_tok if model.moe is not None else 0
        self._logit_bytes = model.vocab_size * LOGIT_BYTES

    def token_seconds(self, rows: Numeric) -> Numeric:
        """All-reduces, expert exchanges and sends between stages of a turn with ``rows`` tokens in each lane."""
        if self._table is not None:
            reduced = self._table(rows)
        else:
            reduced = all_reduce_seconds(rows * self._hidden_bytes, self._parallel.tensor, self._rates)
        seconds = self._all_reduces * self._stretch * reduced
        if self._exchanges:
            seconds = seconds + self._exchanges * self.exchange_seconds(rows)
        if self._parallel.pipeline > 1:
            seconds = seconds + self._sends_seconds(rows)
        return seconds

    def sampled_seconds(self, sampled: Numeric) -> Numeric:
        """Gathering the logits of ``sampled`` sequences from the ranks that each computed a part of the vocabulary."""
        return gather_seconds(sampled * self._logit_bytes, self._parallel.tensor, self._rates)

    def exchange_seconds(self, rows: Numeric) -> Numeric:
        """One MoE layer's dispatch and combine among data parallel ranks of ``rows`` tokens each."""
        if self._backend == "allgather_reducescatter":
            gathered = rows * self._parallel.data * self._hidden_bytes
            ranks = self._group_span()
            return 2.0 * gather_seconds(gathered, ranks, self._rates)
        return self._all_to_all().seconds(rows)

    def _all_to_all(self) -> Exchange:
        """DeepEP: FP8 out, 16 bits back, once to every rank that has one of a token's experts, but not to one's own."""
        rates, ranks = self._rates, self._parallel.expert_ranks
        latency_s, share = rates.deepep(self._backend)
        rate = (rates.link_peak_bytes_per_s or float("inf")) * share
        remote = min(self._top_k, ranks) * (1.0 - 1.0 / ranks)
        if self._parallel.num_devices > rates.domain_devices:
            domains = -(-self._parallel.num_devices // rates.domain_devices)
            latency_s, rate = latency_s + 2.0 * rates.node_latency_s, rates.node_link_bytes_per_s
            remote = min(self._top_k, ranks) * (1.0 - 1.0 / domains)
        return Exchange(latency_s, rate, remote * self._hidden_bytes * FP8_AND_HALF)

    def _group_span(self) -> int:
        """Ranks of the data parallel group; they span as many domains as all ranks do."""
        spans = self._parallel.num_devices > self._rates.domain_devices
        return self._parallel.num_devices if spans else self._parallel.data

    def _sends_seconds(self, rows: Numeric) -> Numeric:
        """Sends of a turn: each stage to the next, the last one's tokens back to the first."""
        stages, tensor, rates = self._parallel.pipeline, self._parallel.tensor, self._rates
        link = rates.link_bytes_per_s
        if link is None:
            return rows * 0.0
        size_bytes = rows * PASSED_TENSORS * self._hidden_bytes
        domains = min(-(-stages * tensor // rates.domain_devices), stages)
        # Every rank of a stage sends its slice; the receiving ranks gather the whole.
        near = rates.send_latency_s + size_bytes / tensor / link
        far = rates.send_latency_s + rates.node_latency_s + size_bytes / tensor / rates.node_link_bytes_per_s
        sends = (stages - domains) * near + (domains - 1) * far
        gathered = (stages - 1) * gather_seconds(size_bytes, tensor, rates) if tensor > 1 else 0.0
        return sends + gathered + (rates.send_latency_s if domains == 1 else rates.node_latency_s)
