"""Import this before triton: kernels run in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

triton = pytest.importorskip("triton", reason="triton is to be had for Linux on x86-64 only")

if not ON_GPU:
    from triton.runtime import interpreter

    # Triton before 3.9 makes an int of an array of one element, which numpy 2.4 no longer allows.
    _patch_tensor = interpreter._patch_lang_tensor

    def _patched(tensor, scope):
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patched
