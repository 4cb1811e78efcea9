"""A diffusers pipeline over an export, a run or a checkpoint: the library's names for what `megadiff sample` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from megadiff.config.errors import UserError
from megadiff.config.schema import Sampling
from megadiff.data.codecs.base import PICTURE, TEXT
from megadiff.data.codecs.build import codec_of
from megadiff.diffusion.sampler import Sampler, States, Times
from megadiff.generation.loading import codecs_of, load
from megadiff.generation.planner import Planner
from megadiff.generation.presets import INPAINT_RESAMPLE
from megadiff.generation.request import GenerateRequest
from megadiff.generation.tasks import INPAINT, JOINT, Task, find_task
from megadiff.models.mmdit import MMDiT
from megadiff.weights import export
from megadiff.weights.loading import HUB, Loaded

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class MegadiffOutput(BaseOutput):  # type: ignore[misc]
    """The result of a call.

    Attributes:
        images: N pictures; for output_type np float [N, H, W, C] and for pt [N, C, H, W], in [0, 1]; None if none were made.
        texts: N captions, or None.
        states: per generated modality the clean states [N, ...].
    """

    images: Any
    texts: list[str] | None
    states: dict[str, Tensor]


class MegadiffPipeline(DiffusionPipeline):  # type: ignore[misc]
    """`MegadiffPipeline.from_pretrained(FOLDER)(prompt="red heart").images[0]`."""

    def __init__(self, denoiser: MMDiT, loaded: Loaded | None = None) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser)
        self._loaded = loaded

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, weights: str = "ema", torch_dtype: torch.dtype | None = None, autoencoder: str | None = None
    ) -> MegadiffPipeline:
        """Load an export, a run, a checkpoint, or a repository of the Hugging Face hub (ORG/NAME).

        Raises:
            UserError: the source holds nothing loadable.
        """
        address = str(source)
        if not Path(address).exists() and address.count("/") == 1 and not address.startswith(HUB):
            address = HUB + address
        loaded = load(address, weights, autoencoder=autoencoder)
        return cls(loaded.module if torch_dtype is None else loaded.module.to(torch_dtype), loaded)

    def save_pretrained(self, folder: str | Path, *, safe_serialization: bool = True) -> None:
        """Write an export. Its weights are always safetensors: raises UserError if others are asked for."""
        if not safe_serialization:
            raise UserError("an export's weights are safetensors; leave safe_serialization=False out")
        tensors = {name: parameter.detach().float().cpu() for name, parameter in self.denoiser.named_parameters()}
        loaded = self.loaded
        export.write(Path(folder), export.Exported(loaded.model, loaded.data, loaded.predicted, tensors, loaded.card))

    @property
    def loaded(self) -> Loaded:
        if self._loaded is None:
            raise UserError("this pipeline has no configuration; make it by MegadiffPipeline.from_pretrained(FOLDER)")
        return self._loaded

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        image: Image.Image | Sequence[Image.Image] | None = None,
        mask_image: Image.Image | None = None,
        strength: float | None = None,
        task: str | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None] | None = None,
        return_dict: bool = True,
        **sampling: Any,
    ) -> MegadiffOutput | tuple[Any, list[str] | None]:
        """Draw samples.

        Args:
            prompt: captions; with `mask_image`, or with ___ in it, the text to complete.
            image: pictures to caption, to fill in, or (with `strength`) to start from.
            mask_image: white marks the places to fill in.
            task: by default the one that the arguments imply: text to image, image to text, in-painting, or pairs from nothing.
            generator: the source of the samples' seeds; one per sample, or one for all; torch's own by default.
            callback_on_step_end: called with (pipeline, step, clocks by modality, {"states": ...}); sampling continues from the
                states that it returns.
            **sampling: other fields of `megadiff.config.schema.Sampling`: order="confidence", guidance_interval=(0.3, 0.8), ...

        Raises:
            UserError: the arguments do not go together, or the model cannot do that.
        """
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type {output_type!r} is unknown; known: {', '.join(OUTPUT_TYPES)}")
        prompts = () if prompt is None else (prompt,) if isinstance(prompt, str) else tuple(prompt)
        if num_images_per_prompt < 1:
            raise UserError(f"num_images_per_prompt is {num_images_per_prompt}; it must be 1 or more")
        images = () if image is None else (image,) if isinstance(image, Image.Image) else tuple(image)
        if not all(isinstance(each, Image.Image) for each in images):
            raise UserError("image takes PIL pictures, or a list of them")
        name = task or self._task_of(prompts, images, mask_image, strength)
        request = GenerateRequest(
            checkpoint=self.loaded.source,
            task=name,
            out="",
            prompt=prompts,
            image=images,
            mask_image=mask_image,
            strength=strength,
            sampling=_sampling(name, num_inference_steps, guidance_scale, sampling),
            n=num_images_per_prompt,
            batch=2**31,  # one chunk: the caller chooses how many samples go together
        )
        keys = _keys(generator, max(len(prompts), len(images), 1) * num_images_per_prompt)
        (chunk,) = Planner(request, self.loaded, codecs_of(self.loaded), keys).chunks()
        _, conditions = chunk.load()
        states = Sampler(self.loaded.model, request.sampling).sample(
            self.denoiser,
            keys.to(self.device),
            generate=chunk.task.generated,
            conditions=conditions.to(self.device),
            after_step=None if callback_on_step_end is None else self._after_step(callback_on_step_end),
        )
        output = self._output(chunk.task, states, output_type)
        return output if return_dict else (output.images, output.texts)

    def _task_of(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image],
        mask_image: Image.Image | None,
        strength: float | None,
    ) -> str:
        if mask_image is not None or any("___" in prompt for prompt in prompts):
            return INPAINT
        if not prompts and (not images or strength is not None):
            return JOINT
        targets = self._of_medium(PICTURE if prompts else TEXT)
        conditions = [name for name in self.loaded.model.modalities if name not in targets]
        name = f"{'+'.join(conditions)}-to-{'+'.join(targets)}"
        return find_task(name, list(self.loaded.model.modalities), self.loaded.predicted).name

    def _of_medium(self, medium: str) -> list[str]:
        """The modalities whose values are of a medium."""
        fields = self.loaded.data.fields
        return [name for name in self.loaded.model.modalities if codec_of(fields[name]).medium == medium]

    def _after_step(self, callback: Callable[..., dict[str, Any] | None]) -> Callable[[int, Times, States], States]:
        def after_step(step: int, clocks: Times, states: States) -> States:
            answer = callback(self, step, clocks, {"states": states}) or {}
            changed: States = answer.get("states", states)
            return changed

        return after_step

    def _output(self, task: Task, states: States, output_type: str) -> MegadiffOutput:
        outputs = {name: states[name] for name in task.generated}
        if output_type == "latent":
            return MegadiffOutput(images=None, texts=None, states=outputs)
        codecs = codecs_of(self.loaded)
        values_of = {name: [codecs[name].decode(state.cpu()) for state in outputs[name]] for name in outputs}
        pictures, texts = (
            next((values_of[name] for name in self._of_medium(medium) if name in values_of), None) for medium in (PICTURE, TEXT)
        )
        return MegadiffOutput(images=_as(output_type, pictures), texts=texts, states=outputs)


def _sampling(task: str, steps: int, guidance: float, others: dict[str, Any]) -> Sampling:
    """Raises UserError if an option is unknown, out of its range, or not the pipeline's."""
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale", "autoguidance": "megadiff sample --guide"}
    if wrong := [name for name in names if name in others]:
        raise UserError(f"{wrong[0]} is not an argument here: use {names[wrong[0]]}")
    defaults = {"resample": INPAINT_RESAMPLE} if task == INPAINT else {}
    try:
        return Sampling(**{**defaults, **others, "steps": steps, "guidance": guidance})
    except ValidationError as error:
        fault = error.errors()[0]
        place = "".join(f"{part}: " for part in fault["loc"])
        raise UserError(place + fault["msg"].removeprefix("Value error, ")) from None


def _keys(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> Tensor:
    """int64 [N] sample keys."""
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return torch.randint(2**62, (count,), generator=generator, device=device).cpu()
    if len(generator) != count:
        raise UserError(f"generator has {len(generator)} entries for {count} samples; give one, or as many as samples")
    return torch.cat([torch.randint(2**62, (1,), generator=each, device=each.device).cpu() for each in generator])


def _as(output_type: str, pictures: list[Image.Image] | None) -> Any:
    if pictures is None or output_type == "pil":
        return pictures
    stacked = np.stack([np.asarray(picture.convert("RGB"), dtype=np.float32) / 255 for picture in pictures])
    return stacked if output_type == "np" else torch.from_numpy(stacked).permute(0, 3, 1, 2)
