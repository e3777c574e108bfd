"""How much an estimate counts that is hardly told from its own noise."""


def shrunk_share(estimate: float, error: float) -> float:
    """Return the share of an estimate that counts: 1 - error^2 / estimate^2, and 0 within its standard error (James and Stein's shrinkage).

    Args:
        estimate: an effect that may be of either sign.
        error: its standard error, in the same unit.
    """
    return 0.0 if abs(estimate) <= error else 1.0 - (error / estimate) ** 2
