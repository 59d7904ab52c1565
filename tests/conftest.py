"""One thread, which is quickest for small tensors; one seed, so that every run gives the same answer."""
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("kda_lit", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("kda_lit")


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)
