"""What an engine holds on a device beside the KV pool: weights of one rank, rotary tables, the profiling peak, its own.

Counted from vLLM's sources as of 0.15.1 (``gpu_worker.determine_available_memory``, ``gpu_model_runner.profile_run``),
with the two constants that no source gives in the priors. docs/serving-memory.md has every formula and its error.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.cost.layer_bytes import draft_weight_bytes
from kvsim.cost.priors import Edge, Prior
from kvsim.deployment import Deployment
from kvsim.parallelism import Parallelism
from kvsim.specs.base import Basis
from kvsim.specs.engine import EngineSpec
from kvsim.specs.model import ModelSpec

HALF_BYTES = 2
SORT_BYTES_PER_LOGIT = 26
"""Top-p by sorting, until 0.15: logits in 16 bits (2), in fp32 (4), sorted values (4) and indices (8), probabilities
(4) and their running sum (4)."""
DRAW_BYTES_PER_LOGIT = 10
"""Without the sort (vLLM pull request 33538): logits in 16 bits (2), in fp32 (4), probabilities (4)."""
FIRST_WITHOUT_SORT = (0, 16)


@dataclass(frozen=True)
class EngineTerm:
    """One addend of what is not KV, in bytes per device."""

    name: str
    size_bytes: float
    formula: str
    source: str
    basis: Basis = Basis.LITERATURE


def engine_terms(deployment: Deployment, edge: Edge = Edge.CENTRAL) -> tuple[EngineTerm, ...]:
    """Weights first, then what the engine takes for itself."""
    if deployment.engine.kind == "llamacpp":
        prior = deployment.priors.runtime_memory_bytes["single_stream"]
        return _weights(deployment), EngineTerm("engine", prior.cost(edge), "compute buffers", prior.source)
    terms = [_weights(deployment), _rotary(deployment), _activations(deployment, edge), _own(deployment, edge)]
    drafter = draft_weight_bytes(deployment)
    terms.insert(1, EngineTerm("drafter", drafter, "draft model, or one mean layer", "counted from the config"))
    if deployment.model.moe is not None:
        moe = _prior(deployment, "moe_extra")
        terms.append(EngineTerm("moe buffers", moe.cost(edge), "not counted; a wide prior", moe.source))
    if deployment.engine.cuda_graph_memory_bytes is not None:
        size = float(deployment.engine.cuda_graph_memory_bytes)
        terms.append(EngineTerm("cuda graphs", size, "engine.cuda_graph_memory_bytes", "as the scenario states it"))
    return tuple(term for term in terms if term.size_bytes)


def rank_weight_bytes(model: ModelSpec, parallel: Parallelism) -> float:
    """Bytes of weights on one rank of the largest stage.

    Tensor parallel ranks slice everything that can be sliced; norms, routers, the down projections of latent attention,
    and KV projections beyond one head a rank are whole on each. Experts are sliced over data parallel ranks as well, or
    whole on as many ranks; everything else is whole on each data parallel rank. Stages share embedding and LM head as
    they do layers. Encoders of other modalities are sliced (vLLM's ``mm_encoder_tp_mode`` weights), in 16 bits.
    """
    stage, tensor = parallel.stage_share(model.num_layers), parallel.tensor
    whole = replicated_bytes(model, tensor) * (1 - 1 / tensor) * stage
    whole += HALF_BYTES * model.num_encoder_parameters / tensor
    if model.moe is None or (parallel.expert_ranks == tensor and not parallel.expert):
        return model.weight_bytes * stage / tensor + whole
    rest = (model.weight_bytes - model.expert_bytes) * stage / tensor
    ranks = parallel.expert_ranks
    held = -(-model.moe.num_experts // ranks) / model.moe.num_experts if parallel.expert else 1.0 / ranks
    return rest + model.expert_bytes * held * stage + whole


def replicated_bytes(model: ModelSpec, ranks: int) -> float:
    """Bytes of those weights that every rank holds whole."""
    if ranks == 1:
        return 0.0
    hidden = model.hidden_size
    routers = hidden * model.moe.num_experts * len(model.moe.layers) if model.moe else 0
    total = float(HALF_BYTES * (hidden * (2 * model.num_layers + 1) + routers))
    linear_bytes = model.weight_bits / 8
    for group in model.groups:
        if group.is_latent and model.mla is not None:
            down = model.mla.kv_lora_rank + model.mla.qk_rope_head_dim + (model.mla.q_lora_rank or 0)
            total += group.num_layers * hidden * down * linear_bytes
        elif 0 < group.num_kv_heads < ranks and not group.is_latent:
            # Each rank holds one head, so the heads are there ranks / heads times; the cut below divides by the ranks.
            kv = hidden * group.num_kv_heads * (group.k_head_dim + group.v_head_dim) * linear_bytes
            total += group.num_layers * kv * (ranks / group.num_kv_heads - 1) / (ranks - 1)
    return total


def rotary_bytes(model: ModelSpec) -> int:
    """Cosine and sine tables in 16 bits: one row per position of the model's limit, whatever ``max_model_len`` is.

    One table per head size that is rotated (vLLM ``get_rope``; pull request 44738 states sizes). Llama-4-Scout, whose
    config allows 10,485,760 positions, has 2.7 GB of them on every rank.
    """
    if model.mla is not None:
        widths = {model.mla.qk_rope_head_dim}
    else:
        widths = {round(group.k_head_dim * model.rotary_fraction) for group in model.kv_groups}
    return model.max_position_embeddings * sum(widths) * HALF_BYTES


def activation_bytes(model: ModelSpec, engine: EngineSpec, ranks: int) -> int:
    """Bytes at the peak of a profiling step of ``max_num_batched_tokens``: the widest layer's values, in 16 bits.

    Input, gate and up projections, their product (three times the MLP's width, a rank's share) and three of the hidden
    size (input, residual, normed); a routed layer repeats them for each chosen expert and keeps each one's output.
    """
    inner = 3 if model.gated_mlp else 2
    widths = [inner * model.intermediate_size / ranks]
    if model.moe is not None:
        moe = model.moe
        routed = moe.num_experts_per_tok * (inner * moe.moe_intermediate_size / ranks + model.hidden_size)
        widths.append(routed + inner * moe.shared_intermediate_size / ranks)
    for group in model.groups:
        heads = model.num_attention_heads * (group.k_head_dim + group.v_head_dim)
        widths.append((heads + 2 * group.num_kv_heads * group.k_head_dim) / ranks)
    return round(engine.max_num_batched_tokens * (max(widths) + 3 * model.hidden_size) * HALF_BYTES)


def sampler_bytes(model: ModelSpec, engine: EngineSpec) -> int:
    """Bytes of sampling ``max_num_seqs`` tokens from the whole vocabulary, which every rank of vLLM profiles.

    0 for other engines, whose profiling steps are bounded by tokens.
    """
    if engine.kind != "vllm":
        return 0
    sorts = engine.release is not None and engine.release < FIRST_WITHOUT_SORT
    sorts = sorts and not engine.use_flashinfer_sampler
    per_logit = SORT_BYTES_PER_LOGIT if sorts else DRAW_BYTES_PER_LOGIT
    return engine.max_num_seqs * model.vocab_size * per_logit


def _weights(deployment: Deployment) -> EngineTerm:
    parallel, model = deployment.parallelism, deployment.model
    formula = f"parameters x bits / 8 / tensor_parallel_size ({parallel.tensor}), norms and routers whole"
    if parallel.pipeline > 1:
        formula += f", x {parallel.stage_layers(model.num_layers)} of {model.num_layers} layers"
    if model.moe is not None and parallel.expert:
        held = -(-model.moe.num_experts // parallel.expert_ranks)
        formula += f"; {held} of {model.moe.num_experts} experts, whole"
    elif parallel.data > 1:
        formula += f"; experts / {parallel.expert_ranks}"
    return EngineTerm("weights", rank_weight_bytes(model, parallel), formula, model.source, Basis.DATASHEET)


def _rotary(deployment: Deployment) -> EngineTerm:
    formula = "max_position_embeddings x rotated head size x 2 bytes"
    size = rotary_bytes(deployment.model)
    return EngineTerm("rotary tables", size, formula, "vLLM get_rope; pull request 44738", Basis.DATASHEET)


def _activations(deployment: Deployment, edge: Edge) -> EngineTerm:
    model, engine = deployment.model, deployment.engine
    floor = _prior(deployment, "activation_floor")
    counted = max(activation_bytes(model, engine, deployment.tensor_parallel_size), sampler_bytes(model, engine))
    formula = "largest of max_num_batched_tokens x widest layer, max_num_seqs x vocabulary, a floor"
    source = "counted from vLLM 0.15.1" if counted > floor.cost(edge) else floor.source
    return EngineTerm("activations", max(counted, floor.cost(edge)), formula, source)


def _own(deployment: Deployment, edge: Edge) -> EngineTerm:
    prior = _prior(deployment, "engine_own")
    formula = "CUDA modules, library workspaces, communicators, allocator slack"
    return EngineTerm("engine", prior.cost(edge), formula, prior.source)


def _prior(deployment: Deployment, name: str) -> Prior:
    return deployment.priors.runtime_memory_bytes[name]
