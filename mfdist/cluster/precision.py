"""How exact a device's products of matrices are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 matrices on CUDA in full float32, whatever this process allows elsewhere (TF32)."""
    settings = torch.backends.cuda.matmul
    with _ONE_AT_A_TIME:  # the setting is the process's: another thread would put it back too early
        before = settings.fp32_precision
        settings.fp32_precision = "ieee"
        try:
            yield
        finally:
            settings.fp32_precision = before
