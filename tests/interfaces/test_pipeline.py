"""The diffusers pipeline: the library's conventions over the same sampler."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megadiff.config.errors import UserError
from megadiff.interfaces.pipeline import MegadiffPipeline


@pytest.fixture(scope="module")
def pipe(exported: Path) -> MegadiffPipeline:
    pipe = MegadiffPipeline.from_pretrained(exported)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_prompt_gives_pictures_and_the_generator_decides_them(pipe):
    def drawn(seed: int) -> np.ndarray:
        output = pipe("red heart", num_inference_steps=3, guidance_scale=2.0, num_images_per_prompt=2, generator=seeded(seed))
        assert output.texts is None
        return np.stack([np.asarray(image) for image in output.images])

    assert drawn(1).shape == (2, 32, 32, 3)
    assert (drawn(1) == drawn(1)).all()
    assert (drawn(1) != drawn(2)).any()
    assert (drawn(1)[0] != drawn(1)[1]).any()


def test_one_generator_per_sample_makes_it_the_same_in_any_company(pipe):
    both = pipe(["red", "sun"], num_inference_steps=3, generator=[seeded(1), seeded(2)], output_type="np").images
    alone = pipe("sun", num_inference_steps=3, generator=[seeded(2)], output_type="np").images
    np.testing.assert_allclose(both[1], alone[0], atol=1.5 / 255)
    with pytest.raises(UserError, match="generator has 1 entries for 2 samples"):
        pipe(["red", "sun"], generator=[seeded()])


def test_output_types(pipe):
    as_numpy = pipe("sun", num_inference_steps=2, generator=seeded(), output_type="np").images
    as_torch = pipe("sun", num_inference_steps=2, generator=seeded(), output_type="pt").images
    states = pipe("sun", num_inference_steps=2, generator=seeded(), output_type="latent").states
    images, texts = pipe("sun", num_inference_steps=2, generator=seeded(), return_dict=False)
    assert as_numpy.shape == (1, 32, 32, 3)
    assert as_torch.shape == (1, 3, 32, 32)
    np.testing.assert_array_equal(as_torch.permute(0, 2, 3, 1).numpy(), as_numpy)
    np.testing.assert_allclose(as_numpy[0], np.asarray(images[0]) / 255, atol=1e-6)
    assert states["image"].shape == (1, 3, 32, 32)
    assert texts is None
    with pytest.raises(UserError, match="output_type 'jpg' is unknown; known: pil, np, pt, latent"):
        pipe("sun", output_type="jpg")


def test_the_arguments_choose_the_task(pipe):
    image = Image.new("RGB", (32, 32), "red")
    captions = pipe(image=[image, image], num_inference_steps=2)
    assert (captions.images, len(captions.texts)) == (None, 2)
    pairs = pipe(num_inference_steps=2, num_images_per_prompt=3)
    assert (len(pairs.images), len(pairs.texts)) == (3, 3)
    filled = pipe("a ___ heart", image=image, mask_image=Image.new("L", (32, 32), 255), num_inference_steps=2)
    assert filled.texts[0].endswith("heart")
    varied = pipe("red", image=image, strength=0.05, num_inference_steps=2, generator=seeded())
    assert np.abs(np.asarray(varied.images[0], dtype=int) - np.asarray(image, dtype=int)).mean() < 30
    other = pipe("red", image=image, strength=0.05, num_inference_steps=2, generator=seeded(1))
    assert np.asarray(varied.images[0]).tolist() != np.asarray(other.images[0]).tolist()


def test_a_callback_sees_every_step_and_may_change_the_states(pipe):
    seen = []

    def callback(owner, step, clocks, values):
        seen.append((step, float(clocks["image"][0])))
        assert owner is pipe
        return {"states": {**values["states"], "image": torch.zeros_like(values["states"]["image"])}} if step == 2 else None

    output = pipe("red", num_inference_steps=3, callback_on_step_end=callback)
    assert [step for step, _ in seen] == [0, 1, 2]
    assert [time for _, time in seen] == pytest.approx([2 / 3, 1 / 3, 0])
    assert np.unique(np.asarray(output.images[0])).tolist() == [128]


def test_sampling_options_pass_through_and_wrong_ones_are_named(pipe):
    assert pipe(image=Image.new("RGB", (32, 32)), num_inference_steps=2, order="confidence", top_p=0.9).texts
    with pytest.raises(UserError, match="solver: Input should be 'euler', 'heun'"):
        pipe("red", solver="rk4")
    for wrong, said in (
        ({"guidance": 3}, "guidance is not an argument here: use guidance_scale"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"image": [np.zeros((32, 32, 3))]}, "image takes PIL pictures"),
        ({"mask_image": Image.new("L", (32, 32)), "image": [Image.new("RGB", (32, 32))] * 2}, "in-painting takes one picture"),
    ):
        with pytest.raises(UserError, match=said):
            pipe("red", **wrong)


def test_it_moves_saves_and_loads_like_any_pipeline(pipe, tmp_path):
    assert pipe.to("cpu").device == torch.device("cpu")
    assert list(pipe.components) == ["denoiser"]
    pipe.save_pretrained(tmp_path / "again")
    again = MegadiffPipeline.from_pretrained(str(tmp_path / "again"))
    first, second = (each("red", num_inference_steps=2, generator=seeded(), output_type="np").images for each in (pipe, again))
    np.testing.assert_array_equal(first, second)
    assert (tmp_path / "again/README.md").read_text() == "a card"
    assert MegadiffPipeline.from_pretrained(tmp_path / "again", torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(UserError, match="is no folder"):
        MegadiffPipeline.from_pretrained(tmp_path / "none")
