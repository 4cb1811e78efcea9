"""Which process a modality's configuration asks for."""

from __future__ import annotations

from megadiff.config.schema import GaussianProcess, MaskedProcess, Modality, Model, TokenSpace, UniformProcess
from megadiff.diffusion.gaussian import Gaussian
from megadiff.diffusion.masked import Masked
from megadiff.diffusion.process import Process
from megadiff.diffusion.uniform import Uniform


def build_process(name: str, modality: Modality) -> Process:
    """The process that a modality's configuration asks for."""
    config, space = modality.process, modality.space
    if isinstance(config, MaskedProcess) and isinstance(space, TokenSpace):
        return Masked(name, config, space)
    if isinstance(config, UniformProcess) and isinstance(space, TokenSpace):
        return Uniform(name, config, space)
    if isinstance(config, GaussianProcess) and not isinstance(space, TokenSpace):
        return Gaussian(name, config, space)
    raise TypeError(f"{name}: a {config.kind} process does not run on a {space.kind} space")  # the schema refuses it first


def build_processes(model: Model) -> dict[str, Process]:
    """One process per modality, in the model's order."""
    return {name: build_process(name, modality) for name, modality in model.modalities.items()}
