"""The released weights of "Diffuse Everything" as a run of ours, and a run of ours in their format (weights/official.py)."""

from __future__ import annotations

import importlib.util
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megadiff.config.errors import UserError
from megadiff.config.load import dump_run
from megadiff.config.parameters import is_trained
from megadiff.config.schema import (
    Batching,
    CaptionField,
    ConstantEma,
    Data,
    LatentField,
    Model,
    Optimizer,
    Run,
    Stage,
    StageModality,
)
from megadiff.data.codecs.clip import build_clip_tokenizer
from megadiff.interfaces.snapshot import WARMUP_STEPS, TrainingState, training_state
from megadiff.models.names import part_of
from megadiff.weights import checkpoint, official, official_config
from megadiff.weights.boxes import whole
from megadiff.weights.checkpoint import CheckpointManifest, tensor_key
from megadiff.weights.export import new_folder
from megadiff.weights.loading import load, local_path
from megadiff.weights.official_config import IMAGE, POSITIONS, TEXT

STAGE, EMA = "released", "main"
CONFIG, WEIGHTS, NETWORK = "config.json", "model.safetensors", "mmdit.yaml"
TOKENIZER = "tokenizer.json"
NO_DATA = "no_training_data_named"
_OPTIMIZER = Optimizer(
    learning_rate=2e-4, betas=(0.9, 0.9), weight_decay=0.03, decay_all=True, warmup_steps=WARMUP_STEPS, gradient_clip=1.0
)
_PACKAGES = {"open_clip": "open_clip_torch", "clip": "clip-anytorch"}
"""Packages with CLIP's vocabulary, and the names to install them by."""
_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_PREFIXES = ("module.", "_orig_mod.", "net.")
"""Prefixes that wrappers (DistributedDataParallel, torch.compile, the released code's own) add to names."""


def import_paper(
    weights: str | Path,
    out: Path,
    *,
    tokenizer: str | None,
    autoencoder: str | None,
    use: Literal["ema", "raw"] | None = None,
) -> tuple[str, ...]:
    """Write released weights as the run folder `out`, with one stage; returns the modalities that it predicts.

    A snapshot with AdamW's moments is imported whole, with plain and averaged weights, moments and step: the stage resumes from
    them once the run names its data. From other sources the averaged weights are imported, and the stage is done.

    Args:
        weights: a Hugging Face folder (config.json, model.safetensors), hf:ORG/NAME (such a folder in a Hugging Face
            repository), or a snapshot (.pt) of the released code.
        tokenizer: CLIP's vocabulary (see data.codecs.clip.build_clip_tokenizer); None takes that of an installed open_clip or
            clip.
        autoencoder: a local folder with the autoencoder of the latents; None: to be named later.
        use: import these weights of a snapshot alone.

    Raises:
        UserError: the weights are not the released network's, a snapshot's optimizer does not fit them, the vocabulary does not
            fit, or `out` is not empty.
    """
    with new_folder(out):
        path = local_path(weights)
        snapshot: Mapping[str, Any] = {} if path.is_dir() else _load_snapshot(path)
        tensors, config = _read_folder(path, use) if path.is_dir() else _read_snapshot(path, snapshot, use or "ema")
        training = _training(path, snapshot) if use is None else None
        model = official_config.model_from_config({**official_config.config_from_tensors(tensors), **config})
        stored = _stored(tensors, training, model)
        words = build_clip_tokenizer(Path(tokenizer) if tokenizer else _installed_vocabulary())
        vocabulary = official_config.vocabulary(model)
        if words.get_vocab_size() != vocabulary:
            raise UserError(
                f"the vocabulary has {words.get_vocab_size()} ids, and the released weights {vocabulary}; give CLIP's own"
            )
        predicted = official.predicted_of(tensors)
        headless = [name for name, modality in model.modalities.items() if modality.tower_depth and name not in predicted]
        if headless or not predicted:
            raise UserError(f"{weights} has no {' and no '.join(headless or (TEXT, IMAGE))} head; the file is not whole")
        run = _run(model, predicted, out, None if autoencoder is None else str(Path(autoencoder).absolute()), training)
        _check_frozen(stored, run.stages[0])
        words.save(str(out / TOKENIZER))
        _write_checkpoint(run, stored, training)
        if training is None or training.optimizer_step >= run.stages[0].steps:
            run.paths.stage(run.stages[0].name).done.touch()
        run.paths.run.write_text(dump_run(run), encoding="utf-8")
        return predicted


def export_paper(source: str, out: Path, weights: Literal["ema", "raw"] = "ema") -> None:
    """Write a run's, a checkpoint's or an export's weights as a Hugging Face folder of the released code.

    Raises:
        UserError: nothing loadable is there, its network is not of the released kind, or `out` is not empty.
    """
    with new_folder(out):
        loaded = load(source, weights)
        config = official_config.config_from_model(loaded.model, loaded.predicted)
        ours = {name: parameter.detach() for name, parameter in loaded.module.named_parameters()}
        tensors = official.to_official(ours, loaded.model)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / WEIGHTS, metadata={"format": "pt"})
        (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- reading


def _read_folder(folder: Path, use: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if use == "raw":
        raise UserError(f"{folder} holds one set of weights; --use {use} is for a snapshot (.pt)")
    path = folder / WEIGHTS
    if not path.exists():
        raise UserError(
            f"{folder} has no {WEIGHTS}; give a Hugging Face folder with {CONFIG} and {WEIGHTS}, or a snapshot (.pt)"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    return _plain_names(tensors), _config_beside(folder)


def _load_snapshot(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a Hugging Face folder, hf:ORG/NAME or a snapshot (.pt)") from None
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is no snapshot that can be read without running code out of it: {reason}") from None


def _read_snapshot(path: Path, snapshot: Any, use: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A dict with the state dicts `model` and `ema`, or one state dict alone."""
    key = {"ema": "ema", "raw": "model"}[use]
    state = snapshot if _is_state(snapshot) else snapshot.get(key) if isinstance(snapshot, Mapping) else None
    if state is None or not _is_state(state):
        keys = ", ".join(map(str, snapshot)) if isinstance(snapshot, Mapping) else type(snapshot).__name__
        raise UserError(f"{path} has no tensors by name under `{key}` (it holds {keys}); try --use {_OTHER[use]}")
    return _plain_names(state), _config_beside(path.parent)


_OTHER = {"ema": "raw", "raw": "ema"}


def _training(path: Path, snapshot: Any) -> TrainingState | None:
    """The training state of a snapshot; None without one."""
    if not isinstance(snapshot, Mapping) or not _is_state(snapshot.get("model")):
        return None
    weights, _ = _read_snapshot(path, snapshot, "raw")
    return training_state(snapshot, weights)


def _is_state(tree: Any) -> bool:
    return isinstance(tree, Mapping) and bool(tree) and all(isinstance(value, Tensor) for value in tree.values())


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_plain(name): tensor for name, tensor in tensors.items()}


def _plain(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return _plain(name.removeprefix(prefix))
    return name


def _config_beside(folder: Path) -> dict[str, Any]:
    """The values in config.json or mmdit.yaml; empty without either, since the weights' shapes suffice."""
    for name in (CONFIG, NETWORK):
        path = folder / name
        if path.exists():
            try:
                tree = yaml.safe_load(path.read_text(encoding="utf-8"))  # which reads JSON as well
            except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
                raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
            if not isinstance(tree, dict):
                raise UserError(f"{path} must hold names and values")
            return official_config.known_values(tree)
    return {}


def _installed_vocabulary() -> Path:
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / _VOCABULARY).exists():
                return Path(folder) / _VOCABULARY
    raise UserError(
        f"the tokenizer needs CLIP's vocabulary: give --vocabulary FILE ({_VOCABULARY}, which the packages "
        f"{' and '.join(_PACKAGES.values())} hold; a tokenizer.json; or a folder with vocab.json and merges.txt)"
    )


# ------------------------------------------------------------------------------------------------------------- writing


def _stored(tensors: Mapping[str, Tensor], training: TrainingState | None, model: Model) -> dict[str, dict[str, Tensor]]:
    """Our tensors, by their kind in a checkpoint; weights alone without a training state."""

    def ours(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.float() for name, tensor in official.from_official(theirs, model).items()}

    if training is None:
        return {"weight": ours(tensors)}
    moments = {}
    for kind, given in training.moments.items():
        nothing = {name: torch.zeros(tensors[name].shape) for name in official.parameter_names(tensors)}
        moments[kind] = ours({**nothing, **given, POSITIONS: tensors[POSITIONS]})
    return {"weight": ours(training.weights), **moments, f"ema.{EMA}": ours(tensors)}


def _check_frozen(stored: Mapping[str, Mapping[str, Tensor]], stage: Stage) -> None:
    """Raises UserError if averages of frozen parameters differ from the weights: a checkpoint holds one value of them."""
    averages = stored.get(f"ema.{EMA}", {})
    for name, average in averages.items():
        part = part_of(name)
        if part in stage.freeze and not torch.allclose(average, stored["weight"][name], rtol=1e-3, atol=1e-5):
            raise UserError(
                f"{name} was frozen in the snapshot's training, and its average is not its weight, which a checkpoint here "
                "cannot hold; take one set of weights by --use ema or --use raw"
            )


def _run(model: Model, predicted: tuple[str, ...], out: Path, autoencoder: str | None, training: TrainingState | None) -> Run:
    """A run for these weights, with the settings of the released code or of its snapshot."""
    out = out.absolute()
    caption = CaptionField(tokenizer=str(out / TOKENIZER), cleaning="clip")
    freeze = () if training is None else training.freeze
    modalities = {
        name: StageModality(predicted=name in predicted, loss_weight=0.0 if name in freeze else 1.0) for name in (TEXT, IMAGE)
    }
    stage = Stage(
        name=STAGE,
        steps=600_000,
        modalities=modalities,
        batch=Batching(global_samples=256, micro_batch=32),
        optimizer=_OPTIMIZER if training is None else training.optimizer,
        antithetic_times=False,
        ema={EMA: ConstantEma(decay=0.9999, warmup=False)},
        freeze=freeze,
    )
    data = Data(train=str(out / NO_DATA), fields={TEXT: caption, IMAGE: LatentField(autoencoder=autoencoder)})
    return Run(name="paper", folder=str(out), model=model, data=data, stages=(stage,))


def _write_checkpoint(run: Run, stored: Mapping[str, Mapping[str, Tensor]], training: TrainingState | None) -> None:
    """Write the checkpoint of the run's stage. Without a training state all parameters count as frozen, which saves moments and
    averages."""
    stage = run.stages[0]
    checkpoints, step = run.paths.stage(stage.name).checkpoints, 0 if training is None else training.optimizer_step
    trained = {name: training is not None and is_trained(part_of(name), stage) for name in stored["weight"]}
    checkpoint.begin(checkpoints, step)
    flat = {
        tensor_key(kind, name): tensor.flatten()
        for kind, tensors in stored.items()
        for name, tensor in tensors.items()
        if kind == "weight" or trained[name]
    }
    extents = {name: whole(tensor.shape) for name, tensor in stored["weight"].items()}
    entry = checkpoint.write_rank_file(checkpoints.partial(step), 0, flat, extents)
    manifest = CheckpointManifest(
        stage=stage.name,
        parameters={name: (tuple(tensor.shape), trained[name]) for name, tensor in stored["weight"].items()},
        ema=tuple(stage.ema),
        progress=_progress(training),
        config=dump_run(run),
        files=(entry,),
    )
    checkpoint.publish(checkpoints, step, manifest, stage.checkpoint)


def _progress(training: TrainingState | None) -> dict[str, Any]:
    """The counters of a checkpoint. The data that a snapshot had seen is not known: it begins anew."""
    if training is None:
        return {"optimizer_step": 0}
    data = {"data_step": 0, "samples": 0, "loader": {}, "skipped": [], "best_step": None, "best_value": None}
    updates = {"adam_steps": training.adam_steps, "ema_updates": training.optimizer_step}
    return {"optimizer_step": training.optimizer_step, **data, **updates}
