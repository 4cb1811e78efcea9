"""Imported weights against a re-statement of the released forward pass by somebody who had read its description alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megadiff.config.schema import Model
from megadiff.diffusion.build import build_processes
from megadiff.models.mmdit import build_model
from megadiff.types import Dense, Noised
from megadiff.weights.official import from_official
from megadiff.weights.official_config import model_from_config
from tests.models.released import Config, forward, random_state

CONFIG = Config(
    img_resolution=8,
    patch_size=2,
    img_channels=4,
    vocab_size=49409,
    context_len=6,
    depth=2,
    text_depth=1,
    image_depth=2,
    dims=(32, 32),
    heads=2,
    head_dim=8,
    pad_id=49407,
)


def our_config(released: Config) -> Model:
    widths = {"dim_modalities": list(released.dims), "dim_conds": list(released.dims), "dim_joint_attn": 32}
    sizes = {**widths, "qk_rmsnorm": True, "flash_attn": False}
    names = ("img_resolution", "patch_size", "img_channels", "vocab_size", "context_len", "depth", "text_depth", "image_depth")
    return model_from_config({**sizes, **{name: getattr(released, name) for name in names}, "heads": 2, "dim_head": 8})


@pytest.mark.parametrize("dims", [(32, 32), (24, 40), (48, 16)])
@pytest.mark.parametrize("pads", [slice(0), slice(0, 1), slice(0, 3), slice(0, 6)], ids=["none", "first", "leading", "all"])
def test_imported_weights_compute_what_the_description_says(dims: tuple[int, int], pads: slice) -> None:
    given = replace(CONFIG, dims=dims)
    state = random_state(given, seed=0)
    torch.manual_seed(1)
    ids, image = torch.randint(0, 49000, (4, 6)), torch.randn(4, 4, 8, 8)
    ids[0, 3:], ids[1, 2:] = CONFIG.pad_id, 49408
    ids[2:, pads] = CONFIG.pad_id
    text_time, image_std = torch.tensor([0.2, 0.7, 0.99, 0.01]), torch.tensor([0.1, 0.5, 0.9, 0.99])
    eps, logs = forward(state, given, ids, text_time, image, image_std)
    tensors = {name: tensor for name, tensor in state.items() if name != "text_pos_embed"}
    tensors["text_pos_embed.weight"] = state["text_pos_embed"].reshape(6, dims[0])  # the published file has an embedding
    config = our_config(given)
    model = build_model(config, ["text", "image"])
    model.load_state_dict(from_official(tensors, config))
    visible = build_processes(config)["text"].visible(ids, text_time)
    noised = Noised({"text": ids, "image": image}, {"text": text_time, "image": image_std}, {"text": visible, "image": None})
    with torch.no_grad():
        ours = model(noised, {"text": Dense(), "image": Dense()})
    assert (ours["image"] - eps).abs().max() < 1e-5
    released = logs[..., :49408]
    assert (ours["text"].log_softmax(-1) - released.log_softmax(-1)).abs().max() < 1e-5
