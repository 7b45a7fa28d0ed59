"""Top-k per row in plain torch."""

import torch


def top_k_reference(
    scores: torch.Tensor, row_lens: torch.Tensor, budgets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the positions of the largest scores of each row, ascending; of equal scores the lowest positions.

    Parameters
    ----------
    scores : Tensor, (num_rows, num_columns)
        No NaN; -inf ranks last, but is kept where the budget is not used up.
    row_lens, budgets : Tensor of int32, (num_rows,)
        Scores that count, and positions wanted, of each row.

    Returns
    -------
    indices : Tensor of int32, (num_rows, max(budgets))
        Filled up with -1.
    kept_lens : Tensor of int32, (num_rows,)
        The smaller of the row's length and its budget.
    """
    max_budget = int(budgets.max())
    indices = torch.full((len(scores), max_budget), -1, dtype=torch.int32, device=scores.device)
    kept_lens = torch.minimum(row_lens, budgets)
    for row, (length, kept) in enumerate(zip(row_lens.tolist(), kept_lens.tolist(), strict=True)):
        order = scores[row, :length].float().sort(descending=True, stable=True).indices
        indices[row, :kept] = order[:kept].sort().values.int()
    return indices, kept_lens
