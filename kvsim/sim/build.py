"""From a deployment to what its replicas are built from: prices in ticks, limits, logs, routers."""

from __future__ import annotations

import numpy as np
import simpy

from kvsim.cost.front_end import front_end
from kvsim.cost.host import host_seconds
from kvsim.cost.priors import Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.step import StepModel
from kvsim.cost.tables import build_tables, in_parts
from kvsim.deployment import Deployment
from kvsim.memory import MemoryPlan
from kvsim.pool import prefill_growths
from kvsim.requests import RequestTable
from kvsim.sim.arrivals import ArrivalSource, front_end_ticks
from kvsim.sim.parts import PoolParts
from kvsim.sim.recorder import RequestLog
from kvsim.sim.routing import Router
from kvsim.sim.scheduling import SchedulerLimits
from kvsim.sim.speculation import build_speculation
from kvsim.specs.routing import RouterThresholds, Routing
from kvsim.units import TICKS_PER_SECOND


def open_log(
    env: simpy.Environment, deployment: Deployment, requests: RequestTable, router: Router, edge: Edge
) -> tuple[ArrivalSource, RequestLog]:
    """Requests on their way through the deployment's front end, and a log with nothing in it but them."""
    front = front_end_ticks(front_end(deployment, edge))
    source = ArrivalSource(env, requests, router, front)
    blank = [-1] * len(requests)
    rejected = [False] * len(requests)
    log = RequestLog(source.sent_ticks, source.arrived_ticks, blank[:], blank[:], blank[:], rejected, front.egress)
    return source, log


def pool_parts(
    deployment: Deployment,
    plan: MemoryPlan,
    requests: RequestTable,
    log: RequestLog,
    max_model_len: int,
    *,
    edge: Edge,
    seed: int = 0,
) -> PoolParts:
    """Price a deployment's steps, and take its limits."""
    engine = deployment.engine
    step = StepModel(deployment, build_rates(deployment.device, deployment.priors, edge))
    tables = build_tables(step, max(most_lane_tokens(deployment), engine.max_num_seqs), engine.max_num_seqs)
    if engine.kind == "llamacpp":
        tables = in_parts(tables, engine.n_ubatch)
    speculation = None
    if engine.speculative_config is not None:
        tables, speculation = build_speculation(
            step, engine.speculative_config, edge, seed=seed, max_model_len=max_model_len
        )
    # Sequences of several levels are priced one by one.
    is_affine = step.sequences.is_affine and deployment.adaptive is None
    return PoolParts(
        lengths=(requests.prompt_tokens.tolist(), requests.output_tokens.tolist()),
        log=log,
        step=step,
        tables=tables,
        limits=scheduler_limits(deployment, plan, max_model_len),
        token_ticks=step.sequences.token_ticks if is_affine else 0,
        host_work=host_work_ticks(step),
        priority=requests.priority.tolist() if requests.priority is not None else None,
        speculation=speculation,
    )


def build_router(requests: RequestTable, routing: Routing, thresholds: RouterThresholds | None) -> Router:
    """A router that knows the requests' prefixes."""
    units = (requests.prompt_tokens / requests.hash_block_tokens).tolist() if routing == "prefix_aware" else ()
    return Router(routing, thresholds or RouterThresholds(), requests.prefix_hashes, units)


def most_lane_tokens(deployment: Deployment) -> int:
    """Most tokens that one lane may process in a step: a data parallel rank may get all prompts of its group."""
    budget, parallel = deployment.engine.max_num_batched_tokens, deployment.parallelism
    if parallel.lanes == 1:
        return budget
    return budget * parallel.data + deployment.engine.max_num_seqs + parallel.lanes


def host_work_ticks(step: StepModel) -> list[int]:
    """Ticks of host work of a step, by its sequences; the host of each lane works beside the others."""
    deployment = step.deployment
    sequences = np.ceil(np.arange(deployment.max_running + 1) / deployment.lanes)
    ticks: list[int] = np.rint(np.asarray(host_seconds(step, sequences)) * TICKS_PER_SECOND).astype(np.int64).tolist()
    return ticks


def scheduler_limits(deployment: Deployment, plan: MemoryPlan, max_model_len: int) -> SchedulerLimits:
    """Limits of one replica of a deployment."""
    engine = deployment.engine
    growths, fixed_bytes = prefill_growths(deployment)
    by_level = [prefill_growths(variant)[0] for variant in deployment.variants]
    return SchedulerLimits(
        max_num_seqs=deployment.max_running,
        max_num_batched_tokens=deployment.step_tokens,
        max_model_len=max_model_len,
        block_size=engine.block_size,
        pool_bytes=plan.num_blocks * plan.block_bytes * deployment.parallelism.data,
        chunked_prefill=engine.enable_chunked_prefill,
        prefill_growths=growths,
        fixed_bytes=fixed_bytes,
        decode_tokens=1 + (engine.speculative_config.num_speculative_tokens if engine.speculative_config else 0),
        # SGLang forgets what it retracts; of TensorRT-LLM it is not known.
        keeps_preempted=engine.kind == "vllm"
        and deployment.prefix_caching
        and all(len(growths) == 1 and growths[0][0] is None for growths in by_level),
        plans_ahead=engine.schedules_ahead,
    )
