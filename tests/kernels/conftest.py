"""Fixtures of the kernels' tests."""

import pytest
import torch

from glm45.kernels import native


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def needs_native():
    """Skip, with the reason, where the native kernels cannot be compiled."""
    if native.library() is None:
        pytest.skip(f"no native kernels: {native.status().reason}")
