"""How well pictures and captions go together by CLIP: its score, and which of N captions or pictures it finds for each.

Legend: N pairs, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megadiff.config.errors import UserError
from megadiff.evaluation.features import Pixels, folder_hash, vision_model
from megadiff.types import Metric

CLIP_SCORE, RETRIEVAL = "clip-score", "retrieval"
PAIRS = (CLIP_SCORE, RETRIEVAL)
"""Metrics of pairs."""
AT_ONCE = 32
"""Pairs that are embedded together."""
SCALE = 100.0
RANKS = (1, 5)
DIRECTIONS = ("image-to-text", "text-to-image")


@dataclass(frozen=True)
class PairScorer:
    """A CLIP of transformers with its own processor, loaded once."""

    model: Any
    processor: Any
    fingerprint: str
    device: torch.device

    def __call__(self, pictures: Sequence[Pixels], captions: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Normalised embeddings float32 [N, D] of pictures (uint8: the processor divides by 255 itself) and of captions, which
        are cut to CLIP's length.
        """
        inputs = self.processor(
            images=list(pictures),
            text=list(captions),
            return_tensors="pt",
            padding=True,
            truncation=True,
            input_data_format="channels_last",
        ).to(self.device)
        with torch.no_grad():
            outputs = self.model(**inputs)
        image, text = (
            side.float() / side.float().norm(dim=1, keepdim=True) for side in (outputs.image_embeds, outputs.text_embeds)
        )
        return image.cpu().numpy(), text.cpu().numpy()

    @property
    def depends(self) -> dict[str, Any]:
        return {"clip_hash": self.fingerprint, "resize": "CLIP's processor"}


def pair_scorer(folder: str | None, device: torch.device) -> PairScorer:
    """Raises UserError if the folder holds no CLIP with its processor."""
    model = vision_model(folder, "--clip", "CLIPModel", device)
    from transformers import CLIPProcessor

    try:
        processor = CLIPProcessor.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--clip {folder} holds no CLIPProcessor: {(str(error).splitlines() or [''])[0]}") from None
    return PairScorer(model, processor, folder_hash(Path(str(folder))), device)


def titles(name: str) -> list[str]:
    """The names of a metric's figures."""
    if name == CLIP_SCORE:
        return ["CLIP score"]
    return [f"R@{rank} {direction}" for direction in DIRECTIONS for rank in RANKS]


def pair_metrics(
    names: Sequence[str], images: NDArray[np.float32], texts: NDArray[np.float32], depends: Mapping[str, Any]
) -> list[Metric]:
    """Those of `PAIRS` that are named, of embeddings [N, D] of pictures and of their captions."""
    score = [clip_score(images, texts, depends)] if CLIP_SCORE in names else []
    return score + (retrieval(images, texts, depends) if RETRIEVAL in names else [])


def clip_score(images: NDArray[np.float32], texts: NDArray[np.float32], depends: Mapping[str, Any]) -> Metric:
    """The mean of 100 max(cosine, 0) (Hessel et al., arXiv 2104.08718, with torchmetrics' factor)."""
    return Metric("CLIP score", float(SCALE * (images * texts).sum(1).clip(0).mean()), depends=depends)


def retrieval(images: NDArray[np.float32], texts: NDArray[np.float32], depends: Mapping[str, Any]) -> list[Metric]:
    """R@1 and R@5 in both directions: the share of pictures whose caption is among the nearest of all N, and the reverse.

    Captions that are equal to a picture's own count as it: of ties none is farther.
    """
    cosines = images @ texts.T
    own = np.diagonal(cosines)
    metrics = []
    of_both = ((cosines > own[:, None]).sum(1), (cosines > own[None]).sum(0))
    for direction, nearer in zip(DIRECTIONS, of_both, strict=True):
        for rank in RANKS:
            metrics.append(
                Metric(f"R@{rank} {direction}", float((nearer < rank).mean()), depends={**depends, "among": len(own)})
            )
    return metrics
