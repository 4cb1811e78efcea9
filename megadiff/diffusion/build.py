"""Processes from the configuration of modalities, and their solvers from that of sampling."""

from __future__ import annotations

from torch import Tensor

from megadiff.config.schema import GaussianProcess, MaskedProcess, Modality, Model, Sampling, TokenSpace, UniformProcess
from megadiff.diffusion.categorical_solvers import UniformReverse, masked_solver
from megadiff.diffusion.gaussian import Gaussian
from megadiff.diffusion.gaussian_solvers import GAUSSIAN_SOLVERS
from megadiff.diffusion.masked import Masked
from megadiff.diffusion.process import Process
from megadiff.diffusion.solvers import Solver
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


def build_solver(process: Process, sampling: Sampling, keys: Tensor, start: Tensor, fixed: Tensor | None = None) -> Solver:
    """The solver of a process for one run. The process must support the order that `sampling` names (checks.order_faults).

    Args:
        keys: int64 [B], of the samples.
        start: float32 [B], the time at which the run starts.
        fixed: bool [B, S], positions that are known; None where none are.
    """
    match process:
        case Gaussian():
            return GAUSSIAN_SOLVERS[sampling.solver](process)
        case Uniform():
            return UniformReverse(process, sampling)
        case Masked():
            return masked_solver(process, sampling, keys, start, fixed)
    raise TypeError(f"{process.name}: there is no solver for a {type(process).__name__} process")
