"""Compiled blocks on a GPU: a step of training, and sampling from CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from megadiff import rng
from megadiff.config.schema import Sampling
from megadiff.diffusion.sampler import Sampler
from megadiff.models import compiling
from megadiff.types import Dense, RowLogits
from tests.models.small import small_config, small_model, small_noised

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
CONFIG = small_config(width=128, head_dim=64)


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_values_and_gradients_are_those_of_the_model_as_it_is():
    model, noised = small_model(CONFIG).to(DEVICE), small_noised()
    on_device = noised._replace(
        states={name: state.to(DEVICE) for name, state in noised.states.items()},
        clocks={name: clock.to(DEVICE) for name, clock in noised.clocks.items()},
        visible={name: None if mask is None else mask.to(DEVICE) for name, mask in noised.visible.items()},
    )
    readout = {"words": RowLogits(torch.arange(4, device=DEVICE)), "picture": Dense()}

    def outcome():
        outputs = model(on_device, readout)
        loss = sum(output.square().sum() for output in outputs.values())
        return [*outputs.values(), *torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)]

    expected = outcome()
    compiling.compile_for_training(model)
    for found, wanted in zip(outcome(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_cuda_graphs_draw_the_same_step_after_step():
    model = small_model(CONFIG).to(DEVICE).eval()
    sampler = Sampler(CONFIG, Sampling(steps=6, solver="dpmpp_2m", temperature=0.0))
    keys = rng.sample_keys(0, torch.arange(4)).to(DEVICE)
    with torch.no_grad():
        expected = sampler.sample(model, keys, generate=["words", "picture"])
        compiling.compile_for_sampling(model)
        for _ in range(3):  # a graph is recorded at its second run
            found = sampler.sample(model, keys, generate=["words", "picture"])
            torch.testing.assert_close(found["picture"], expected["picture"], atol=1e-3, rtol=1e-3)
            assert torch.equal(found["words"], expected["words"])
