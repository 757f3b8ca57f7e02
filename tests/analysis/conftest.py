"""Images for the networks."""

import pytest
import torch


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 24, 30, generator=torch.Generator().manual_seed(0))
