"""Recipes for sampling by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INPAINT_RESAMPLE = 4
"""Default number of times that in-painting makes each step."""

PROMPT_REPEATS = 10
"""Times that `repeat_prompt` repeats a caption, as the paper's code does; the context cuts it."""

PAPER = {"steps": 50, "solver": "heun_time", "grid": "paper", "order": "tau_leaping"}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The recipe of the paper's FID: its README's command for COCO's captions.
    "paper-t2i": {**PAPER, "guidance": 5.0, "guidance_interval": (0.3, 0.8), "repeat_prompt": True},
    # Its README's command for pairs; there only the image is guided, here both are.
    "paper-joint": {**PAPER, "guidance": 4.0},
}
"""By name: fields of `Sampling`, and `repeat_prompt`."""
