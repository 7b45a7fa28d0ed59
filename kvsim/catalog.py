"""From names to a deployment: look everything up, and refuse pairs that cannot go together, with the reason."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from kvsim.adaptive import Adaptive
from kvsim.adaptive_checks import check_levels
from kvsim.allocator import kv_heads_per_rank, layer_token_cap, state_bytes_per_sequence
from kvsim.calibration.engine_fits import engine_fit
from kvsim.calibration.sets import AUTO, CalibrationSet, load_set
from kvsim.compression import Compression
from kvsim.compression.base import KvEncoding, LayerView
from kvsim.compression.selection.base import TokenSelection
from kvsim.cost.priors import load_priors
from kvsim.deployment import Deployment, LayerClass, layer_bands
from kvsim.device_catalog import ResolvedDevice, load_device
from kvsim.errors import IncompatibleScenario, InvalidSpec, KvsimError, UnknownName
from kvsim.model_catalog import load_model
from kvsim.parallel_checks import check_parallelism
from kvsim.parallelism import Parallelism
from kvsim.price_list import default_price
from kvsim.scenario import Scenario
from kvsim.specs.device import DeviceSpec
from kvsim.specs.engine import EngineSpec
from kvsim.specs.model import LayerGroup, LayerKind, ModelSpec
from kvsim.tier_rules import check_tiers, tier_compression

DATASHEET = "datasheet"
"""Name of the calibration that uses no fitted kernel."""
ATTENTION = ("decode_attention", "prefill_attention", "mla_decode", "mla_prefill")


def resolve(scenario: Scenario, *, base_dir: Path | None = None, in_pool: bool = True) -> Deployment:
    """Replace every name of ``scenario``; raise UnknownName, InvalidSpec or IncompatibleScenario.

    ``in_pool``: whether attention reads the KV, so that formats which it cannot read are refused.
    """
    if scenario.adaptive is not None:
        return _resolve_adaptive(scenario, scenario.adaptive, base_dir)
    device, model = look_up(scenario, base_dir=base_dir)
    if in_pool and scenario.compression.refused_in_pool:
        msg = f"compression: {scenario.compression.refused_in_pool}"
        raise IncompatibleScenario(msg)
    notes = [device.notice] if device.notice else []
    _check(scenario, model, device.spec)
    calibration = resolve_calibration(scenario, device.spec, base_dir=base_dir)
    if calibration is not None:
        notes += calibration.stale_notes(device.spec.name)
    parallelism, replicas = _parallelism(scenario, model)
    if replicas > scenario.replicas:
        notes.append(
            f"data_parallel_size {scenario.data_parallel_size}: {model.name} is dense, so each rank is a replica"
        )
    price = scenario.price or default_price(device.spec.name)
    return Deployment(
        model=model,
        device=device.spec,
        engine=scenario.engine,
        compression=scenario.compression,
        parallelism=parallelism,
        replicas=replicas,
        layer_classes=_layer_classes(scenario, model),
        state_bytes_per_sequence=-(-state_bytes_per_sequence(model) // scenario.tensor_parallel_size),
        priors=load_priors(),
        price=price,
        prefix_caching=scenario.engine.enable_prefix_caching and not scenario.compression.bars_prefix_reuse,
        notes=tuple(notes),
        calibration=calibration,
        tier_classes=_tier_classes(scenario, model, device.spec),
        sampling=scenario.engine.sampling.filled_from(model.generation),
        engine_fit=engine_fit(device.spec.name) if calibration is None and scenario.calibration != DATASHEET else None,
        draft=_draft(scenario, base_dir),
    )


def at_level(scenario: Scenario, level: int) -> Scenario:
    """The scenario that serves every request at one level of its adaptive compression."""
    if scenario.adaptive is None:
        return scenario
    chosen = scenario.adaptive.levels[level]
    engine = scenario.engine
    if chosen.kv_cache_dtype_skip_layers is not None:
        engine = engine.model_copy(update={"kv_cache_dtype_skip_layers": chosen.kv_cache_dtype_skip_layers})
    return scenario.model_copy(update={"compression": chosen.compression, "engine": engine, "adaptive": None})


def _resolve_adaptive(scenario: Scenario, adaptive: Adaptive, base_dir: Path | None) -> Deployment:
    """A deployment of several levels; the plain one where the policy leaves a single level to choose."""
    if adaptive.only_level is not None:
        plain = _resolve_level(scenario, adaptive.only_level, base_dir)
        return replace(plain, notes=(*plain.notes, f"adaptive: every request is at level {adaptive.only_level}"))
    levels = tuple(_resolve_level(scenario, level, base_dir) for level in range(len(adaptive.levels)))
    first, notes = levels[0], list(levels[0].notes)
    check_levels(scenario, first.model)
    notes.append(f"KV figures and effects are those of level 0 ({adaptive.levels[0].name})")
    prefix_caching = all(level.prefix_caching for level in levels)
    return replace(first, adaptive=adaptive, levels=levels, prefix_caching=prefix_caching, notes=tuple(notes))


def _resolve_level(scenario: Scenario, level: int, base_dir: Path | None) -> Deployment:
    try:
        return resolve(at_level(scenario, level), base_dir=base_dir)
    except (IncompatibleScenario, InvalidSpec) as error:
        has_own_layers = scenario.adaptive is not None and scenario.adaptive.levels[level].kv_cache_dtype_skip_layers
        if str(error).startswith("compression:"):
            error.locate(f"adaptive.levels.{level}")
        elif has_own_layers and str(error).startswith("engine.kv_cache_dtype_skip_layers:"):
            error.args = (f"adaptive.levels.{level}.{str(error).removeprefix('engine.')}",)
        raise


def _draft(scenario: Scenario, base_dir: Path | None) -> Deployment | None:
    """Resolve the draft model like a scenario of its own, uncompressed and without drafts."""
    config = scenario.engine.speculative_config
    if config is None or config.model is None:
        return None
    alone = scenario.engine.model_copy(update={"speculative_config": None})
    changes = {"model": config.model, "engine": alone, "compression": Compression()}
    try:
        return resolve(scenario.model_copy(update=changes), base_dir=base_dir)
    except KvsimError as error:
        error.locate("engine.speculative_config.model")
        raise


def _parallelism(scenario: Scenario, model: ModelSpec) -> tuple[Parallelism, int]:
    """(ranks of one replica, replicas): data parallel ranks of a dense model share nothing, so they are replicas."""
    data = scenario.data_parallel_size if model.moe is not None else 1
    parallelism = Parallelism(
        scenario.tensor_parallel_size, scenario.pipeline_parallel_size, data, scenario.enable_expert_parallel
    )
    return parallelism, scenario.replicas * (scenario.data_parallel_size // data)


def look_up(scenario: Scenario, *, base_dir: Path | None = None) -> tuple[ResolvedDevice, ModelSpec]:
    """Find the scenario's device and model; raise UnknownName naming the field."""
    with at_field("device"):
        device = load_device(scenario.device)
    with at_field("model"):
        model = load_model(scenario.model, base_dir=base_dir)
    return device, model


def resolve_calibration(
    scenario: Scenario, device: DeviceSpec, *, base_dir: Path | None = None
) -> CalibrationSet | None:
    """Find the scenario's calibration set; None where it wants none or the set has nothing for the device.

    Raises
    ------
    UnknownName
        No set has that name, or none of the device's attention kernels has the name that the engine asks for.
    InvalidSpec, CalibrationError
        The set cannot be read or is not to be trusted.
    """
    if scenario.calibration == DATASHEET:
        found = None
    else:
        with at_field("calibration"):
            loaded = load_set(scenario.calibration, base_dir=base_dir)
        found = loaded if loaded.covers(device.name) else None
    kernel = scenario.engine.attention_kernel
    if kernel != AUTO:
        known = dict.fromkeys(name for op in ATTENTION for name in (found.kernels(device.name, op) if found else ()))
        if kernel.partition("@")[0] not in known:
            kind = f"attention kernel on {device.name}"
            raise UnknownName(kind, kernel, (AUTO, *known), where="engine.attention_kernel")
    return found


@contextmanager
def at_field(field: str) -> Iterator[None]:
    """Name the scenario's field in an error about an unknown name."""
    try:
        yield
    except UnknownName as error:
        error.locate(field)
        raise


def _check(scenario: Scenario, model: ModelSpec, device: DeviceSpec) -> None:
    engine = scenario.engine
    if engine.max_num_batched_tokens < engine.max_num_seqs and (engine.kind != "sglang" or engine.enable_mixed_chunk):
        msg = (
            f"engine.max_num_batched_tokens: {engine.max_num_batched_tokens} is less than engine.max_num_seqs "
            f"{engine.max_num_seqs}; every running sequence needs one token a step"
        )
        raise InvalidSpec(msg)
    _check_skipped_layers(engine, model)
    _check_drafts(scenario, model)
    check_tiers(engine, device)
    check_parallelism(scenario, model, device)
    reason = scenario.compression.check(model, device)
    if reason:
        msg = f"compression: {scenario.compression.name} cannot run {model.name} on {device.name}: {reason}"
        raise IncompatibleScenario(msg)
    if scenario.price is not None and scenario.price.device not in (device.name, scenario.device):
        msg = f"price.device: {scenario.price.device!r} is not the scenario's device {device.name!r}"
        raise InvalidSpec(msg)


def _check_skipped_layers(engine: EngineSpec, model: ModelSpec) -> None:
    outside = [
        index
        for index in engine.kv_cache_dtype_skip_layers
        if isinstance(index, int) and not 0 <= index < model.num_layers
    ]
    if outside:
        msg = (
            f"engine.kv_cache_dtype_skip_layers: {outside[0]} is not a layer of {model.name}; allowed: 0 to "
            f"{model.num_layers - 1}, sliding_window"
        )
        raise InvalidSpec(msg)


def _check_drafts(scenario: Scenario, model: ModelSpec) -> None:
    engine, config = scenario.engine, scenario.engine.speculative_config
    if config is None:
        return
    rows = (config.num_speculative_tokens + 1) * engine.max_num_seqs
    if engine.max_num_batched_tokens < rows:
        msg = (
            f"engine.max_num_batched_tokens: {engine.max_num_batched_tokens} is less than max_num_seqs x "
            f"(num_speculative_tokens + 1) = {rows}, the rows that all running sequences verify"
        )
        raise InvalidSpec(msg)
    if _parallelism(scenario, model)[0].lanes > 1:
        msg = (
            "engine.speculative_config: drafts are priced for one lane of sequences, not for pipeline stages or data "
            "parallel ranks of experts; use tensor_parallel_size, or leave one of them out"
        )
        raise IncompatibleScenario(msg)


def _layer_classes(scenario: Scenario, model: ModelSpec) -> tuple[LayerClass, ...]:
    classes = []
    num_layers, skipped = model.num_layers, scenario.engine.kv_cache_dtype_skip_layers
    is_hybrid = any(group.kind is LayerKind.LINEAR for group in model.groups)
    for own in model.kv_groups:
        group = scenario.compression.selection.trained_group(own)
        alike: defaultdict[tuple[KvEncoding, TokenSelection | None], list[LayerView]] = defaultdict(list)
        for index in group.layers:
            view = LayerView(index, num_layers, group)
            encoding = scenario.compression.encoding_at(view, skipped, is_hybrid=is_hybrid)
            selection = scenario.compression.selection.at_layer(view) if group.kind is LayerKind.FULL else None
            alike[encoding, selection].append(view)
        classes += [_layer_class(scenario, group, parts, views) for parts, views in alike.items()]
    return tuple(classes)


def _tier_classes(
    scenario: Scenario, model: ModelSpec, device: DeviceSpec
) -> tuple[tuple[LayerClass, ...] | None, ...]:
    """Layers as each tier stores them, where it has a KV encoding of its own."""
    found: list[tuple[LayerClass, ...] | None] = []
    for index, tier in enumerate(scenario.engine.all_kv_tiers):
        compression = tier_compression(index, tier)
        if compression is None:
            found.append(None)
            continue
        stored = compression.model_copy(update={"selection": scenario.compression.selection})
        reason = compression.check(model, device)
        if reason:
            msg = f"engine.kv_tiers[{index}].encoding: {reason}"
            raise IncompatibleScenario(msg)
        found.append(_layer_classes(scenario.model_copy(update={"compression": stored}), model))
    return tuple(found)


def _layer_class(
    scenario: Scenario, group: LayerGroup, parts: tuple[KvEncoding, TokenSelection | None], views: list[LayerView]
) -> LayerClass:
    encoding, selection = parts
    engine = scenario.engine
    return LayerClass(
        group=group,
        encoding=encoding,
        bands=layer_bands(tuple(views), selection),
        selection=selection,
        prefill_cap=layer_token_cap(group, engine.kind, max_num_batched_tokens=engine.max_num_batched_tokens),
        decode_cap=layer_token_cap(group, engine.kind, max_num_batched_tokens=1),
        kv_heads_per_rank=kv_heads_per_rank(group, scenario.tensor_parallel_size),
    )
