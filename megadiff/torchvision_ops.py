"""torchvision beside a torch that cannot load its operators: PyPI's are built for CUDA's torch, and do not go with a CPU's.

Without them torchvision ends its own import (`operator torchvision::nms does not exist`), and with it that of clean-fid and of
most models in transformers and diffusers, none of which calls these operators here.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""The operators that torchvision names when it is imported."""


@functools.cache
def declare_missing() -> None:
    """Declare torchvision's operators without an implementation if its library cannot be loaded.

    Call this before importing clean-fid, transformers or diffusers. Without torchvision it does nothing.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))  # type: ignore[no-untyped-call]
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for schema in SCHEMAS:
            library.define(schema)  # type: ignore[no-untyped-call]
        _KEPT.append(library)


_KEPT: list[object] = []
"""What is declared lasts as long as its library."""
