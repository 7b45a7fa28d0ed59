"""Capacity and the four separate effects of a compression, in closed form at a stated batch and context."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from kvsim.closed_form import decode_split, prefill_split, total_seconds
from kvsim.compression import Compression
from kvsim.compression.base import LayerView
from kvsim.cost.layer_bytes import layer_bytes_per_token
from kvsim.cost.priors import Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.step import StepModel
from kvsim.deployment import Deployment, layer_bands
from kvsim.memory import MemoryPlan
from kvsim.report import Effects, Figure, KvCapacity
from kvsim.requests import UNSCHEDULED, RequestTable
from kvsim.specs.base import DTYPE_BITS, Basis
from kvsim.specs.model import LayerKind
from kvsim.statistics import spread
from kvsim.units import TICKS_PER_SECOND


@dataclass(frozen=True)
class LoadShape:
    """A workload's means. ``request_rate`` is None for a closed loop of ``concurrency`` clients."""

    prompt_tokens: int
    output_tokens: int
    request_rate: float | None
    concurrency: int | None


def load_shape(requests: RequestTable) -> LoadShape:
    """Mean lengths, and the arrival rate of an open loop or the clients of a closed one."""
    prompt = max(1, round(float(np.mean(requests.prompt_tokens))))
    output = max(1, round(float(np.mean(requests.output_tokens))))
    waiting = requests.arrival_ticks == UNSCHEDULED
    starts = requests.arrival_ticks[~waiting]
    if waiting.any():
        return LoadShape(prompt, output, None, len(starts))
    span_s = float(starts.max() - starts.min()) / TICKS_PER_SECOND
    if span_s <= 0:
        return LoadShape(prompt, output, None, len(starts))
    return LoadShape(prompt, output, (len(starts) - 1) / span_s, None)


@dataclass(frozen=True)
class EdgeModels:
    """Step models of a deployment and of the same with the model's own KV cache, at each priced edge."""

    mine: Mapping[Edge, StepModel]
    native: Mapping[Edge, StepModel]


def price_edges(deployment: Deployment, edges: Iterable[Edge]) -> EdgeModels:
    """Build every step model that a report needs, once."""
    rates = {edge: build_rates(deployment.device, deployment.priors, edge) for edge in edges}
    mine = {edge: StepModel(deployment, at_edge) for edge, at_edge in rates.items()}
    if deployment.compression == Compression():
        return EdgeModels(mine, mine)
    plain = uncompressed(deployment)
    return EdgeModels(mine, {edge: StepModel(plain, at_edge) for edge, at_edge in rates.items()})


def sequence_tokens(load: LoadShape) -> int:
    """Tokens of the mean request at its end."""
    return load.prompt_tokens + load.output_tokens


def uncompressed(deployment: Deployment) -> Deployment:
    """The same deployment with the model's own KV cache."""
    native = Compression()
    classes = []
    num_layers = deployment.model.num_layers
    for group in deployment.model.kv_groups:
        like = next(c for c in deployment.layer_classes if c.group.layers == group.layers)
        selection = native.selection if group.kind is LayerKind.FULL else None
        views = tuple(LayerView(index, num_layers, group) for index in group.layers)
        bands = layer_bands(views, selection)
        classes.append(replace(like, group=group, encoding=native.encoding, bands=bands, selection=selection))
    return replace(deployment, compression=native, layer_classes=tuple(classes))


def capacity(models: EdgeModels, plan: MemoryPlan, load: LoadShape, peak_kv_utilization: float | None) -> KvCapacity:
    """KV of the mean sequence, and how many of them the pool of one replica holds."""
    deployment = models.mine[Edge.CENTRAL].deployment
    parallel = deployment.parallelism
    ranks, stages = parallel.tensor, parallel.pipeline
    held = resident_bytes(models.mine[Edge.CENTRAL], load)
    plain = resident_bytes(models.native[Edge.CENTRAL], load)
    pool_bytes = plan.num_blocks * plan.block_bytes * parallel.data
    per_token = sum(
        size * layer_bytes_per_token(layer_class, view, deployment.model)
        for layer_class in deployment.layer_classes
        for view, size in layer_class.bands
    )
    native_per_token = sum(
        group.num_layers * group.kv_elements_per_token * DTYPE_BITS[deployment.model.dtype] / 8
        for group in deployment.model.kv_groups
    )
    tokens = sequence_tokens(load)
    return KvCapacity(
        kv_bytes_per_token=per_token * ranks,
        native_kv_bytes_per_token=native_per_token,
        fold=plain / held if held else 1.0,
        compression_ratio=1.0 - held / plain if plain else 0.0,
        block_size=deployment.engine.block_size,
        num_blocks=plan.num_blocks * parallel.data,
        capacity_tokens=plan.num_blocks * parallel.data * deployment.engine.block_size,
        sequence_tokens=tokens,
        sequence_kv_bytes=float(held * ranks * stages),
        max_concurrency=pool_bytes / held if held else float("inf"),
        peak_kv_utilization=peak_kv_utilization,
        basis=Basis.LITERATURE,
    )


def resident_bytes(step: StepModel, load: LoadShape) -> int:
    """Bytes on one rank of the mean sequence at its end."""
    profile = step.sequences.profile(load.prompt_tokens)
    return profile.peak_bytes(max(0, load.output_tokens - 1), step.deployment.engine.block_size)


def effects(models: EdgeModels, load: LoadShape, batch: int) -> Effects:
    """Prefill tax, decode gain and capacity gain against the uncompressed cache, each with its band.

    Both caches are priced at the same edge: what makes one slow makes the other slow.
    """
    batch = max(1, batch)
    generated = load.output_tokens // 2
    tax, gain = [], []
    for edge, mine in models.mine.items():
        plain = models.native[edge]
        tax.append(
            total_seconds(prefill_split(mine, load.prompt_tokens))
            / total_seconds(prefill_split(plain, load.prompt_tokens))
        )
        gain.append(
            total_seconds(decode_split(plain, batch, load.prompt_tokens, generated))
            / total_seconds(decode_split(mine, batch, load.prompt_tokens, generated))
        )
    central = models.mine[Edge.CENTRAL]
    deployment = central.deployment
    basis = Basis.DATASHEET if deployment.compression.stores_native else Basis.LITERATURE
    held, unheld = resident_bytes(central, load), resident_bytes(models.native[Edge.CENTRAL], load)
    return Effects(
        prefill_tax=spread(tax, basis),
        decode_gain=spread(gain, basis),
        capacity_gain=Figure(value=unheld / held if held else 1.0, basis=Basis.DATASHEET),
        queueing_effect=Figure(value=None),
        reference_batch=batch,
        reference_context_tokens=load.prompt_tokens + generated,
    )
