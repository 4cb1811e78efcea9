"""A request to `megadiff sample`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from megadiff.config.schema import Sampling


@dataclass(frozen=True)
class GenerateRequest:
    """The flags of `megadiff sample`, one field each (see its help); programs may pass pictures instead of files."""

    checkpoint: str
    task: str
    out: str
    weights: str = "ema"
    prompt: tuple[str, ...] = ()
    prompts: str | None = None
    data: str | None = None
    image: tuple[str | Image.Image, ...] = ()
    mask_image: str | Image.Image | None = None
    table: str | None = None
    strength: float | None = None
    condition_time: float = 0.0
    blank_tokens: int = 2
    repeat_prompt: bool = False
    limit_context_len: int | None = None
    guide: str | None = None
    autoencoder: str | None = None
    size: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    n: int | None = None
    batch: int = 32
    compile: bool = False
    format: str = "folder"

    def record(self) -> dict[str, Any]:
        """All that samples depend on, apart from rounding, as JSON. A folder of samples is continued only if it is equal."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["sampling"] = self.sampling.model_dump(mode="json")
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        return {name: value for name, value in values.items() if name not in ("out", "compile")}
