"""How one engine's devices share a model: sliced layers, stages of layers, ranks of sequences, spread experts.

Names are vLLM's. A replica has ``tensor x pipeline x data`` devices; replicas know nothing of each other.
"""

from __future__ import annotations

from dataclasses import dataclass

LANE_GRAIN = 16
"""The part of a step that grows with context is kept in sixteenths of a lane's share, so that the fullest lane's part
of any batch is a whole multiple of it and sums stay exact."""


@dataclass(frozen=True)
class Parallelism:
    """Ranks of one engine along each dimension, and whether experts are whole on ranks instead of sliced.

    ``data`` counts ranks that run in step because they share experts; replicas of a dense model are not among them.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert: bool = False

    @property
    def num_devices(self) -> int:
        """Devices of one engine."""
        return self.tensor * self.pipeline * self.data

    @property
    def lanes(self) -> int:
        """Parts that the running sequences are dealt to: micro-batches of a pipeline, or data parallel ranks.

        A lane's sequences are in one forward pass; a step of the engine is one turn of every lane.
        """
        return self.pipeline * self.data

    @property
    def expert_ranks(self) -> int:
        """Ranks that the experts of one layer are spread over."""
        return self.tensor * self.data

    def sequences_per_lane(self, sequences: int) -> int:
        """Sequences of the fullest lane."""
        return -(-sequences // self.lanes)

    def stage_layers(self, num_layers: int) -> int:
        """Layers of the largest stage."""
        return -(-num_layers // self.pipeline)

    def stage_share(self, num_layers: int) -> float:
        """Part of the layers that the largest stage holds: what one device keeps of weights and KV."""
        return self.stage_layers(num_layers) / num_layers

    def turn_stretch(self, num_layers: int) -> float:
        """How much longer a turn takes than all layers once, because the largest stage sets the pace."""
        return self.pipeline * self.stage_layers(num_layers) / num_layers

    def lane_factors(self, max_sequences: int) -> list[int]:
        """`lane_factor` by batch size; 0 for none."""
        return [0, *(self.lane_factor(size) for size in range(1, max_sequences + 1))]

    def lane_factor(self, sequences: int) -> int:
        """What a batch's context part, priced in sixteenths of a lane's share, is multiplied by: the fullest lane's.

        1 for a single lane, whose part is kept whole.
        """
        if self.lanes == 1:
            return 1
        return -(-LANE_GRAIN * self.lanes * self.sequences_per_lane(max(1, sequences)) // max(1, sequences))

    @property
    def context_share(self) -> float:
        """What the price of an attended token is multiplied by before `lane_factor` applies."""
        return 1.0 if self.lanes == 1 else 1.0 / (LANE_GRAIN * self.lanes)
