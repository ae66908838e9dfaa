"""Triton for tests of kernels, on a GPU or in its interpreter. Where neither works, importing this skips the module."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are defined
pytest.importorskip("triton", reason="Triton is not installed (torch for CPUs comes without it)")

from speculens import kernels  # noqa: E402 - by now Triton knows how it is to run

try:
    kernels.add_norm(torch.ones(1, 4, device=DEVICE), None, torch.ones(4, device=DEVICE), 1e-6)
except Exception as error:
    if DEVICE == "cuda":
        raise
    pytest.skip(f"Triton's interpreter does not work here: {error}", allow_module_level=True)
