"""Small networks of random weights in the formats of those that evaluation takes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megadiff import torchvision_ops


class _Layers(nn.Module):
    """Inception's `layers` in small: normalised pixels [B, 3, 299, 299] to 2048 features."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 2048, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(nn.functional.avg_pool2d(x, 99)).relu().amax((2, 3))


class _Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = _Layers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def stand_in_inception(path: Path, seed: int = 0) -> Path:
    """A TorchScript file with the layout of inception-2015-12-05.pt."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(_Inception().eval()).save(str(path))
    return path


def tiny_clip(folder: Path) -> Any:
    """A CLIPModel of random weights with its processor's files, in `folder`."""
    torchvision_ops.declare_missing()
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**layers, "vocab_size": 300, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config={**layers, "image_size": 32, "patch_size": 8}, projection_dim=12)
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    words = {word: place for place, word in enumerate(["<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **marks).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": 32},
                "crop_size": {"height": 32, "width": 32},
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.25, 0.25, 0.25],
            }
        )
    )
    return model
