"""A tiny Llama and what it reads, for the tests of caches."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.models import family_config


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(family_config("llama")).eval()


@pytest.fixture
def ids():
    return torch.randint(3, 255, (2, 500), generator=torch.Generator().manual_seed(0))
