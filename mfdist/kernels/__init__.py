"""The arithmetic of a training step on packed rows: one interface, a plain torch reference and fast ones."""


def stride_of(width: int, state_width: int) -> int:
    """Floats of a packed row: weights, optimizer state and ``last`` (an int32's bits), up to a multiple of four."""
    return -(-(width + state_width + 1) // 4) * 4
