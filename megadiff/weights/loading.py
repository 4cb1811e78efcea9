"""A network to sample from, or its tensors to export, from a run, a checkpoint, an export, or a Hugging Face repository."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from megadiff.config import parameters
from megadiff.config.errors import UserError
from megadiff.config.load import load_run, validate
from megadiff.config.run_folder import MANIFEST, RUN, CheckpointsFolder, RunFolder
from megadiff.config.schema import Data, Model
from megadiff.files import sha256
from megadiff.models.mmdit import MMDiT, build_model
from megadiff.models.names import part_of
from megadiff.storage import addresses
from megadiff.types import ALIGNMENT
from megadiff.weights import export
from megadiff.weights.card import model_card
from megadiff.weights.checkpoint import CheckpointError, CheckpointReader, WeightSource, newest_checkpoint, pointed_to
from megadiff.weights.posthoc import Combination, Profile, combine, power_exponent, reconstruct, tracked_averages
from megadiff.weights.remote import fetched
from megadiff.weights.universal import is_universal, open_source

HUB = "hf:"
AUTOENCODER = "autoencoder"
LONGEST_EMA = 0.29
"""The relative standard deviation of power-function profiles is below sqrt(1/12), at which they are flat."""


@dataclass(frozen=True)
class Loaded:
    """A network in evaluation mode.

    Attributes:
        predicted: the modalities with heads.
        source: a description of the origin, for people.
        fingerprint: a hash of the weights.
        card: the model card's text.
    """

    model: Model
    data: Data
    predicted: tuple[str, ...]
    module: MMDiT
    source: str
    fingerprint: str
    card: str


def load(address: str, weights: str = "ema", device: torch.device | str = "cpu") -> Loaded:
    """Load weights for sampling.

    Args:
        address: a run's folder (its newest checkpoint), a checkpoint's folder, an export's folder, or hf:ORG/NAME (an export
            in a Hugging Face repository); a run or a checkpoint may lie in an object store (s3://BUCKET/runs/NAME).
        weights: `ema` or `raw`; without effect on an export, which holds one set.

    Raises:
        UserError: the address holds nothing loadable.
    """
    folder = local_path(address)
    if not folder.is_dir():
        raise UserError(f"{address} is no folder; give a run, a checkpoint, an export, or hf:ORG/NAME")
    if (folder / export.CONFIG).exists():
        loaded = export.read(folder)
        module = _build(loaded.model, loaded.predicted, loaded.tensors, device)
        fingerprint = sha256(folder / export.WEIGHTS)
        return Loaded(loaded.model, loaded.data, loaded.predicted, module, f"export {address}", fingerprint, loaded.card)
    if not (folder / MANIFEST).exists():
        folder = _newest(folder)
    checkpoint = from_checkpoint(folder, weights)
    module = _build(checkpoint.model, checkpoint.predicted, checkpoint.tensors, device)
    source = f"{folder} ({weights} weights)"
    fingerprint = sha256(folder / MANIFEST)  # it holds the hashes of all files
    return Loaded(checkpoint.model, checkpoint.data, checkpoint.predicted, module, source, fingerprint, checkpoint.card)


def compile_network(loaded: Loaded) -> None:
    """Let the network's blocks run compiled, for sampling."""
    from megadiff.models.compiling import compile_for_sampling  # imports the compiler, which takes seconds

    compile_for_sampling(loaded.module)


def from_checkpoint(folder: Path, weights: str) -> export.Exported:
    """A checkpoint's configuration and whole tensors on the CPU."""
    reader = _checked(folder)
    kind = reader.weight_kind(weights)
    description = "plain weights" if weights == "raw" else f"averaged weights ({kind})"
    return _exported(reader, lambda name: reader.read_whole(kind, name), description)


def _checked(folder: Path) -> CheckpointReader:
    """Raises CheckpointError if a file of the checkpoint is damaged."""
    reader = CheckpointReader(folder)
    damaged = reader.damaged(reader.manifest.files)
    if damaged:
        raise CheckpointError(f"{folder}: {', '.join(damaged)} is damaged (its checksum differs); delete {folder}")
    return reader


def _exported(reader: CheckpointReader, read: Callable[[str], torch.Tensor], description: str) -> export.Exported:
    """A checkpoint's configuration with tensors that `read` gives by name; the card has the weights' `description`."""
    run = validate(yaml.safe_load(reader.manifest.config), f"{reader.folder / MANIFEST} (config)")
    stage = run.stage(reader.manifest.stage)
    needed = [name for name in reader.manifest.parameters if part_of(name) != ALIGNMENT]  # that part is for training only
    card = model_card(run, stage, step=reader.manifest.progress["optimizer_step"], weights=description)
    tensors = {name: read(name) for name in needed}
    return export.Exported(run.model, _with_own_files(run.data, reader.folder), parameters.predicted(stage), tensors, card)


def _with_own_files(data: Data, checkpoint: Path) -> Data:
    """The data section with the paths of its tokenizers and other files on this machine.

    A run names them relative to the folder that it was trained in, which is mostly one above its own.

    Raises:
        UserError: a file is missing.
    """
    fields = {}
    for name, field in data.fields.items():
        paths = {key: path for key in field.FILES if (path := getattr(field, key)) is not None and addresses.is_local(path)}
        nearest = {key: _nearest(path, checkpoint) for key, path in paths.items()}
        for key, path in nearest.items():
            if path is None and key != AUTOENCODER:  # that one has a flag, and is not always needed
                above = list(checkpoint.absolute().parents)[:3][-1]
                raise UserError(
                    f"{checkpoint} needs the {key} of {name}, {paths[key]}, which lies neither in this folder nor in {above} "
                    "or above; start where the run was trained, or copy the file there"
                )
        fields[name] = field.model_copy(update={key: path for key, path in nearest.items() if path is not None})
    return data.model_copy(update={"fields": fields})


def _nearest(path: str, checkpoint: Path) -> str | None:
    """A file or folder that a run names: beside the checkpoint or in a folder above it, else in the working folder."""
    named = addresses.local_path(path)
    above = [folder / named for folder in checkpoint.absolute().parents]
    # import-paper writes into the run's own folder, which may have been moved since.
    own = [folder / named.name for folder in list(checkpoint.absolute().parents)[:3]] if named.is_absolute() else []
    return next((str(candidate) for candidate in (*above, *own, named) if candidate.exists()), None)


def export_average(source: str, out: str, length: float, stage_name: str | None) -> Combination:
    """Export an average of any length, reconstructed from those in a stage's checkpoints.

    Raises:
        UserError: the checkpoints hold none, the length is out of range, or `out` is not empty.
    """
    if not 0 < length < LONGEST_EMA:
        raise UserError(f"--length {length:g} must lie between 0 and {LONGEST_EMA}")
    folder = Path(source)
    if not (folder / RUN).exists():
        raise UserError(f"{folder} is no run: it has no {RUN}")
    run = load_run(folder / RUN)
    newest = _newest(folder) if stage_name is None else newest_checkpoint(RunFolder(folder), [run.stage(stage_name).name])
    reader = CheckpointReader(newest)
    snapshots = tracked_averages(CheckpointsFolder(newest.parent), run.stage(reader.manifest.stage).ema)
    for path in {snapshot.reader.folder for snapshot in snapshots}:
        _checked(path)
    wanted = Profile(snapshots[-1].profile.updates, power_exponent(length))
    combination = combine([snapshot.profile for snapshot in snapshots], wanted)
    parts = f"reconstructed from {len(snapshots)} averages (profile within {combination.error:.1%})"
    description = f"an average of length {length:g}, {parts}"
    export.write(Path(out), _exported(reader, lambda name: reconstruct(snapshots, combination.coefficients, name), description))
    return combination


def export_run(source: str, out: str, weights: str = "ema") -> None:
    """Export a run's newest checkpoint, or one checkpoint's folder.

    Raises:
        UserError: there is no checkpoint, or `out` is not empty.
    """
    folder = local_path(source)
    if (folder / export.CONFIG).exists():
        raise UserError(f"{source} is an export already; copy its folder")
    export.write(Path(out), from_checkpoint(folder if (folder / MANIFEST).exists() else _newest(folder), weights))


def checkpoint_of(address: str) -> WeightSource:
    """A checkpoint by its folder (ours, or DeepSpeed's universal), or the newest one of a run's folder.

    Raises:
        UserError: there is none.
    """
    folder = local_path(address)
    return open_source(folder if (folder / MANIFEST).exists() or is_universal(folder) else _newest(folder))


def _newest(folder: Path) -> Path:
    stored = folder / RUN
    if not stored.exists():
        raise UserError(
            f"{folder} is neither a run (no {RUN}), nor a checkpoint (no {MANIFEST}), nor an export (no {export.CONFIG})"
        )
    run = load_run(stored)
    return newest_checkpoint(RunFolder(folder), [stage.name for stage in run.stages])


def _build(model: Model, predicted: tuple[str, ...], tensors: dict[str, torch.Tensor], device: torch.device | str) -> MMDiT:
    with torch.device("meta"):
        module = build_model(model, predicted)
    names = {name for name, _ in module.named_parameters()}
    if names != set(tensors):
        differing = sorted(names ^ set(tensors))
        raise UserError(f"the weights do not fit their own configuration: {', '.join(differing[:5])} stand on one side only")
    with torch.device(device):
        module = build_model(model, predicted)
    module.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()})
    return module.eval().requires_grad_(False)


def local_path(address: str | Path) -> Path:
    """The path itself; for RUN/best the run's best checkpoint; for hf:ORG/NAME the folder with the downloaded Hugging Face
    repository; for the address of a run or checkpoint in an object store that with the downloaded checkpoint.

    Raises:
        UserError: it cannot be downloaded.
    """
    if not addresses.is_local(str(address)):
        return fetched(str(address))
    if pointed := pointed_to(Path(address)):
        return pointed
    repository = str(address).removeprefix(HUB)
    return Path(_download(repository) if repository != str(address) else address)


def _download(repository: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(repository))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"hf:{repository} cannot be had: {first_line}") from None
