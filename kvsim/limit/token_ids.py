"""Token ids instead of KV: bits per value near nothing, and a prefill for every use. No point of the curve."""

from __future__ import annotations

from typing import Final

from kvsim.analysis import price_edges
from kvsim.closed_form import prefill_split, total_seconds
from kvsim.cost.basis import component_basis, weakest
from kvsim.cost.priors import Edge
from kvsim.errors import InvalidSpec
from kvsim.prepare import prepare
from kvsim.report import Figure
from kvsim.scenario import Scenario
from kvsim.specs.base import DTYPE_BITS, Spec
from kvsim.specs.model import LayerGroup, LayerKind, ModelSpec
from kvsim.specs.workload import BurstArrivals, ConstantLengths, SyntheticWorkload

TOKEN_ID_BYTES: Final = 4
CLAIM: Final = (
    "KV follows from token ids and weights, so a claim of a million-fold compression (914,000x over TurboQuant in "
    "theory, arXiv 2604.15356, abstract) says no more than: store the ids, 3.3 to 4.3 bits of entropy each at "
    "perplexity 10 to 20, and compute everything again. We know of no measured system behind it; every read of KV "
    "stored so costs this prefill."
)


class TokenIdTier(Spec):
    """What it takes to keep token ids alone, and to make their KV again."""

    model: str
    device: str
    num_devices: int
    context_tokens: int
    bytes_per_token: int
    bits_per_value: float
    fold: float
    """KV in the model's own dtype over ids."""
    prefill_flops: float
    prefill_s: Figure
    claim: str = CLAIM


def token_id_tier(model: str, device: str, context_tokens: int, tensor_parallel_size: int = 1) -> TokenIdTier:
    """Price the tier for one context, alone on its devices.

    Raises
    ------
    UnknownName, InfeasibleScenario
        As a scenario does: there is no such model or device, or the model does not fit it.
    InvalidSpec
        The model keeps no KV per token, or the context is longer than one sequence may be.
    """
    prepared = prepare(_one_prompt(model, device, context_tokens, tensor_parallel_size))
    if context_tokens >= prepared.max_model_len:
        msg = f"--context {context_tokens}: a sequence holds less than {prepared.max_model_len} tokens here"
        raise InvalidSpec(msg)
    deployment = prepared.deployment
    steps = price_edges(deployment, prepared.edges).mine
    seconds = {edge: total_seconds(prefill_split(step, context_tokens)) for edge, step in steps.items()}
    spec = deployment.model
    values = sum(group.kv_elements_per_token * group.num_layers for group in spec.kv_groups)
    if not values:
        msg = f"{spec.name} keeps no KV per token"
        raise InvalidSpec(msg)
    return TokenIdTier(
        model=spec.name,
        device=deployment.device.name,
        num_devices=deployment.parallelism.num_devices,
        context_tokens=context_tokens,
        bytes_per_token=TOKEN_ID_BYTES,
        bits_per_value=8 * TOKEN_ID_BYTES / values,
        fold=values * DTYPE_BITS[spec.dtype] / 8 / TOKEN_ID_BYTES,
        prefill_flops=prefill_flops(spec, context_tokens),
        prefill_s=Figure(
            value=seconds[Edge.CENTRAL],
            low=min(seconds.values()),
            high=max(seconds.values()),
            basis=weakest(basis for part, basis in component_basis(deployment).items() if part in _PARTS),
        ),
    )


def _one_prompt(model: str, device: str, context_tokens: int, tensor_parallel_size: int) -> Scenario:
    return Scenario(
        model=model,
        device=device,
        tensor_parallel_size=tensor_parallel_size,
        workload=SyntheticWorkload(
            num_prompts=1,
            input_len=ConstantLengths(tokens=context_tokens),
            output_len=ConstantLengths(tokens=1),
            arrivals=BurstArrivals(),
        ),
    )


_PARTS: Final = ("weights", "attention")


def prefill_flops(model: ModelSpec, tokens: int) -> float:
    """FLOPs of one prompt: two per active weight and token, two per head, channel and query-key pair, one LM head."""
    linear = 2.0 * (model.num_active_parameters - model.num_embedding_parameters) * tokens
    attention = sum(group.num_layers * _attention_flops(model, group, tokens) for group in model.groups)
    return linear + attention + 2.0 * model.hidden_size * model.vocab_size


def _attention_flops(model: ModelSpec, group: LayerGroup, tokens: int) -> float:
    if group.kind in (LayerKind.LINEAR, LayerKind.MLP):
        return 0.0
    key_dim, value_dim = group.k_head_dim, group.v_head_dim or group.k_head_dim
    if group.is_latent and model.mla is not None:
        # Prefill runs MLA on per-head keys and values.
        key_dim = model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim
        value_dim = model.mla.v_head_dim
    seen = min(tokens, group.index_topk or group.window_tokens or tokens)
    pairs = tokens * seen - seen * (seen - 1) / 2
    return 2.0 * model.num_attention_heads * (key_dim + value_dim) * pairs
