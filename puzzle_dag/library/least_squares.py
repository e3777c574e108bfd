"""Ridge regression from sums of outer products, so that no more than a batch of features is ever held."""

import torch
from torch import Tensor

RIDGE = 1e-4
"""Ridge, relative to the mean diagonal of X^T X; chosen by no data, small against any feature that matters."""


class Moments:
    """X^T X and X^T Y over all batches, products in float32 and sums in float64."""

    def __init__(self) -> None:
        """Start with no batches."""
        self.gram: Tensor | None = None
        self.cross: Tensor | None = None

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add a batch: features [..., n], targets [..., k]."""
        x, y = features.flatten(0, -2).float(), targets.flatten(0, -2).float()
        gram, cross = (x.T @ x).double(), (x.T @ y).double()
        self.gram = gram if self.gram is None else self.gram.add_(gram)
        self.cross = cross if self.cross is None else self.cross.add_(cross)


def ridge_weight(gram: Tensor, cross: Tensor, prior: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return W [k, n], float64, that minimises ||X W^T - Y||^2 + r ||W - prior||^2.

    Args:
        gram: X^T X, [n, n].
        cross: X^T Y, [n, k].
        prior: what the weight is drawn to, [k, n]; where the data say nothing (a dead feature), it stays.
        ridge: r relative to the mean diagonal of `gram`.
    """
    gram, cross, prior = gram.double(), cross.double(), prior.double()
    # A feature that is all zero must not make the system singular.
    scale = ridge * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    system = gram + scale * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution: Tensor = torch.linalg.solve(system, cross + scale * prior.T)
    return solution.T.contiguous()
