"""CLIP score and retrieval, on a small CLIP of random weights and on embeddings by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megadiff.config.errors import UserError
from megadiff.evaluation.clip_score import clip_score, pair_scorer, retrieval
from tests.evaluation.networks import tiny_clip

CPU = torch.device("cpu")


def test_pictures_are_taken_as_bytes_so_that_they_are_divided_by_255_once(tmp_path: Path):
    model = tiny_clip(tmp_path)
    scorer = pair_scorer(str(tmp_path), CPU)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    images, texts = scorer(list(pixels), ["a cat", "a very long caption beyond sixteen letters"])
    normalised = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=normalised).pooler_output.numpy()
    np.testing.assert_allclose(images, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, rtol=1e-5)
    alone = scorer([pixels[1]], ["a cat"])
    np.testing.assert_allclose(alone[0][0], images[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(alone[1][0], texts[0], rtol=1e-4, atol=1e-5)


def test_a_folder_without_a_processor_is_one_sentence(tmp_path: Path):
    tiny_clip(tmp_path)
    for path in (*tmp_path.glob("*processor*"), *tmp_path.glob("token*")):
        path.unlink()
    with pytest.raises(UserError, match="holds no CLIPProcessor") as caught:
        pair_scorer(str(tmp_path), CPU)
    assert "\n" not in str(caught.value)


def test_the_score_is_a_hundred_times_the_mean_cosine_without_negative_ones():
    images, texts = np.eye(3, dtype=np.float32), np.array([[0.6, 0.8, 0], [0, -1, 0], [0, 0, 1]], dtype=np.float32)
    metric = clip_score(images, texts, {"count": 3})
    assert metric.value == pytest.approx(100 * (0.6 + 0 + 1) / 3)
    assert metric.depends == {"count": 3}


def test_retrieval_counts_own_captions_among_the_nearest_in_both_directions():
    images = np.eye(6, dtype=np.float32)
    texts = images.copy()
    texts[[0, 1]] = texts[[1, 0]]  # two captions exchanged: each picture's own is no nearer than four others
    found = {metric.name: metric.value for metric in retrieval(images, texts, {})}
    assert found == {
        "R@1 image-to-text": pytest.approx(4 / 6),
        "R@5 image-to-text": 1,
        "R@1 text-to-image": pytest.approx(4 / 6),
        "R@5 text-to-image": 1,
    }
    same = np.repeat(images[:1], 6, axis=0)
    assert {metric.value for metric in retrieval(images, same, {}) if "image-to-text" in metric.name} == {1}  # ties
