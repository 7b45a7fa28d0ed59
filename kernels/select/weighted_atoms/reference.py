"""Weighted atoms in plain torch: the same rounds, with the same rules for ties."""

from collections.abc import Mapping
from typing import Any

import torch


def balanced_assignment(features: torch.Tensor, centres: torch.Tensor, num_rounds: int) -> torch.Tensor:
    """Assign each token of one row to a centre, clusters differing in size by one token at most.

    Parameters
    ----------
    features : Tensor, (tokens, num_features)
    centres : Tensor, (num_centres, num_features)
    num_rounds : int
        In each, every token without a seat chooses the nearest centre with a free one (of equals, the first), and a
        centre seats the first tokens that chose it. What is left fills the free seats in order.

    Returns
    -------
    Tensor of int32, (tokens,)
    """
    tokens, num_centres = len(features), len(centres)
    index = torch.arange(num_centres, device=features.device)
    seats = tokens // num_centres + (index < tokens % num_centres).long()
    assignment = torch.full((tokens,), -1, dtype=torch.long, device=features.device)
    wide = centres.float()
    closeness = features.float() @ wide.T - 0.5 * wide.square().sum(-1)
    for _ in range(num_rounds):
        open_closeness = closeness.masked_fill(seats <= 0, float("-inf"))
        best = open_closeness.amax(-1, keepdim=True)
        choice = (open_closeness == best).int().argmax(-1)
        chooses = (assignment < 0) & (best[:, 0] > float("-inf"))
        chose = torch.nn.functional.one_hot(choice, num_centres) * chooses[:, None]
        rank = chose.cumsum(0) - chose
        seated = ((rank < seats) & (chose > 0)).any(-1)
        assignment = torch.where(seated, choice, assignment)
        seats = seats - torch.minimum(chose.sum(0), seats)
    waiting = (assignment < 0).nonzero()[:, 0]
    assignment[waiting] = index.repeat_interleave(seats)
    return assignment.int()


def weighted_atoms_reference(inputs: Mapping[str, Any], num_rounds: int) -> dict[str, torch.Tensor]:
    """Cluster and average every row; inputs and results as for `WeightedAtoms`."""
    features, centres, row_lens = inputs["features"], inputs["centres"], inputs["row_lens"]
    batch, num_kv_heads, max_tokens, _ = features.shape
    num_centres = centres.shape[2]
    device = features.device
    assignment = torch.full((batch, num_kv_heads, max_tokens), -1, dtype=torch.int32, device=device)
    shape = (batch, num_kv_heads, num_centres)
    atoms = {name: torch.zeros(*shape, inputs[name].shape[-1], device=device) for name in ("key", "value")}
    log_weight = torch.zeros(shape, device=device)
    for b in range(batch):
        for h in range(num_kv_heads):
            tokens = int(row_lens[b, h])
            if not tokens:
                continue
            assignment[b, h, :tokens] = balanced_assignment(features[b, h, :tokens], centres[b, h], num_rounds)
            member = assignment[b, h, :tokens].long()
            sizes = torch.bincount(member, minlength=num_centres).clamp(min=1).float()
            log_weight[b, h] = sizes.log()
            for name, atom in atoms.items():
                rows = inputs[name][b, :tokens, h].float()
                atom[b, h] = atom[b, h].index_add(0, member, rows) / sizes[:, None]
    return {"assignment": assignment, "atom_key": atoms["key"], "atom_value": atoms["value"], "log_weight": log_weight}
