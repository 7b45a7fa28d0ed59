"""The matrix products of one forward pass, per tensor-parallel rank."""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.ops import Numeric
from kvsim.specs.model import LayerGroup, LayerKind, MlaShape, ModelSpec, MoeShape


@dataclass(frozen=True, slots=True)
class Gemm:
    """A product of ``rows`` x k by k x n, repeated ``count`` times; ``experts`` of them chosen by routing.

    ``rows`` are those of this rank; rows of all ``data_ranks`` meet at the experts.
    """

    name: str
    k: int
    n: int
    count: int
    num_experts: int = 0
    experts_per_token: int = 0
    local_experts: int = 0
    """Experts that the fullest rank holds; 0 where every rank holds (a slice of) all."""
    data_ranks: int = 1

    @property
    def is_spread(self) -> bool:
        """Whether experts are whole and lie on different ranks."""
        return 0 < self.local_experts < self.num_experts

    @property
    def visits_per_row(self) -> float:
        """Visits to this rank's experts per row of this rank, in expectation; 1 for a dense product."""
        if not self.num_experts:
            return 1.0
        visits = self.experts_per_token * self.data_ranks
        return visits * self.local_experts / self.num_experts if self.local_experts else float(visits)

    def flops(self, rows: Numeric) -> Numeric:
        """FLOPs of one repetition for ``rows`` tokens: 2·rows·k·n, times the experts each token visits here."""
        return 2.0 * rows * self.k * self.n * self.visits_per_row

    def matrices_touched(self, rows: Numeric) -> Numeric:
        """Matrices of k x n weights read in one repetition: 1, or as many experts as ``rows`` tokens visit.

        Of E experts, tokens that pick k each at random touch E·(1 - (1 - k/E)^rows) in expectation.
        """
        if not self.num_experts:
            return 1.0
        miss = 1.0 - self.experts_per_token / self.num_experts
        return (self.local_experts or self.num_experts) * (1.0 - miss ** (rows * self.data_ranks))


def forward_gemms(
    model: ModelSpec, tensor_parallel_size: int, *, data_ranks: int = 1, expert_parallel: bool = False
) -> tuple[Gemm, ...]:
    """All linear layers of one forward pass on one rank, LM head excluded.

    ``data_ranks`` ranks of sequences share the experts: sliced over all ranks, or whole and spread over them.
    """
    gemms: list[Gemm] = []
    for group in model.groups:
        gemms += _attention_gemms(model, group, tensor_parallel_size)
    gemms += _dense_mlp_gemms(model, tensor_parallel_size)
    if model.moe:
        gemms += _moe_gemms(model, model.moe, tensor_parallel_size, data_ranks, expert_parallel=expert_parallel)
    return tuple(gemms)


def lm_head(model: ModelSpec, tensor_parallel_size: int) -> Gemm:
    """Hidden states to vocabulary, for the tokens that are sampled."""
    return Gemm("lm_head", model.hidden_size, -(-model.vocab_size // tensor_parallel_size), 1)


def _attention_gemms(model: ModelSpec, group: LayerGroup, tp: int) -> list[Gemm]:
    hidden, layers = model.hidden_size, group.num_layers
    if group.kind is LayerKind.MLP:
        return []
    if group.kind is LayerKind.LINEAR:
        if model.linear is None:
            return []
        columns = -(-model.linear.parameters_per_layer // (hidden * tp))
        return [Gemm("linear_attention_proj", hidden, columns, layers)]
    heads = -(-model.num_attention_heads // tp)
    if group.is_latent and model.mla is not None:
        return _mla_gemms(hidden, heads, layers, model.mla)
    kv_heads = 0 if group.shares_kv else max(1, group.num_kv_heads // tp)
    v_dim = group.v_head_dim or group.k_head_dim
    columns = heads * group.k_head_dim + kv_heads * (group.k_head_dim + group.v_head_dim)
    return [Gemm("qkv_proj", hidden, columns, layers), Gemm("o_proj", heads * v_dim, hidden, layers)]


def _mla_gemms(hidden: int, heads: int, layers: int, mla: MlaShape) -> list[Gemm]:
    q_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    if mla.q_lora_rank is None:
        query = [Gemm("q_proj", hidden, heads * q_dim, layers)]
    else:
        query = [
            Gemm("q_a_proj", hidden, mla.q_lora_rank, layers),
            Gemm("q_b_proj", mla.q_lora_rank, heads * q_dim, layers),
        ]
    return [
        *query,
        Gemm("kv_a_proj", hidden, mla.kv_lora_rank + mla.qk_rope_head_dim, layers),
        Gemm("kv_b_proj", mla.kv_lora_rank, heads * (mla.qk_nope_head_dim + mla.v_head_dim), layers),
        Gemm("o_proj", heads * mla.v_head_dim, hidden, layers),
    ]


def _dense_mlp_gemms(model: ModelSpec, tp: int) -> list[Gemm]:
    hidden = model.hidden_size
    gemms: list[Gemm] = []
    moe_layers = len(model.moe.layers) if model.moe else 0
    mlp_layers = sum(group.num_layers for group in model.groups if group.kind is LayerKind.MLP)
    # Models with layers that are only an MLP have none beside attention.
    dense_layers = (mlp_layers or model.num_layers) - moe_layers
    if dense_layers and model.intermediate_size:
        gemms += _mlp("mlp", hidden, -(-model.intermediate_size // tp), dense_layers, gated=model.gated_mlp)
    return gemms


def _moe_gemms(model: ModelSpec, moe: MoeShape, tp: int, data_ranks: int, *, expert_parallel: bool) -> list[Gemm]:
    layers, hidden, gated = len(moe.layers), model.hidden_size, model.gated_mlp
    ranks = tp * data_ranks
    width = moe.moe_intermediate_size if expert_parallel else -(-moe.moe_intermediate_size // ranks)
    local = -(-moe.num_experts // ranks) if expert_parallel and ranks > 1 else 0
    experts = (moe.num_experts, moe.num_experts_per_tok, local, data_ranks)
    routed = _mlp("experts", hidden, width, layers, gated=gated, experts=experts)
    gemms = [Gemm("router", hidden, moe.num_experts, layers), *routed]
    if moe.shared_intermediate_size:
        gemms += _mlp("shared_expert", hidden, -(-moe.shared_intermediate_size // tp), layers, gated=gated)
    return gemms


def _mlp(name: str, hidden: int, width: int, layers: int, *, gated: bool, experts: tuple[int, ...] = ()) -> list[Gemm]:
    up = 2 * width if gated else width
    return [
        Gemm(f"{name}.gate_up_proj" if gated else f"{name}.up_proj", hidden, up, layers, *experts),
        Gemm(f"{name}.down_proj", width, hidden, layers, *experts),
    ]
