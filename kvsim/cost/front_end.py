"""What a request waits for outside the engine: HTTP, tokeniser, detokeniser and the way of its tokens to the client.

The engine never sees it. A part comes before (the engine learns of the request later than it was sent) and a part
after (every token reaches the client later than it came out), so gaps between tokens do not change.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.cost.priors import Edge, Prior
from kvsim.deployment import Deployment
from kvsim.specs.engine import EngineSpec


@dataclass(frozen=True)
class FrontEnd:
    """Seconds of a request before and after the engine, and the least time between two requests let through."""

    ingress_s: float
    egress_s: float
    interval_s: float

    @property
    def overhead_s(self) -> float:
        """What it adds to time to first token and to end-to-end latency of a request that does not queue for it."""
        return self.ingress_s + self.egress_s


def overhead_prior(deployment: Deployment) -> Prior | None:
    """Prior of a request's time outside the engine; None where the engine has no front end in Python."""
    if deployment.engine.kind == "llamacpp":
        return None
    table = deployment.priors.request_overhead_s
    return table.get(deployment.engine.kind, table["default"])


def front_end(deployment: Deployment, edge: Edge) -> FrontEnd:
    """The front end of one deployment at an edge of its priors."""
    engine = deployment.engine
    overhead_s = engine.request_overhead_s
    if overhead_s is None:
        prior = overhead_prior(deployment)
        overhead_s = prior.cost(edge) if prior is not None else 0.0
    ingress_s = overhead_s * deployment.priors.request_ingress_share["default"].value
    return FrontEnd(ingress_s, overhead_s - ingress_s, _interval_s(engine))


def _interval_s(engine: EngineSpec) -> float:
    rate = engine.front_end_requests_per_s
    return 1.0 / rate if rate is not None else 0.0
