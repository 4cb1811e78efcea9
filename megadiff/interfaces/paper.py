"""The released weights of "Diffuse Everything" as a run of ours, and a run of ours in their format (models/official.py)."""

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
from megadiff.data.clip import build_clip_tokenizer
from megadiff.engine import checkpoint
from megadiff.engine.checkpoint import Manifest, tensor_key
from megadiff.interfaces.weights import load, local_path
from megadiff.models import official
from megadiff.models.official import IMAGE, TEXT

STAGE = "released"
CONFIG, WEIGHTS, NETWORK = "config.json", "model.safetensors", "mmdit.yaml"
TOKENIZER = "tokenizer.json"
NO_DATA = "no_training_data_named"
_PACKAGES = {"open_clip": "open_clip_torch", "clip": "clip-anytorch"}
"""Packages that hold CLIP's vocabulary, with the names under which they are installed."""
_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_PREFIXES = ("module.", "_orig_mod.", "net.")
"""What wrappers (DistributedDataParallel, torch.compile, the released code's own) put before the names."""


def import_paper(
    weights: str | Path, out: Path, *, tokenizer: str | None, autoencoder: str | None, use: Literal["ema", "raw"] = "ema"
) -> tuple[str, ...]:
    """Write released weights as the run folder `out`, with one finished stage; returns the modalities that it predicts.

    Args:
        weights: a Hugging Face folder (config.json, model.safetensors), hf:ORG/NAME (such a folder in a Hugging Face
            repository), or a snapshot (.pt) of the released code.
        tokenizer: CLIP's vocabulary (see data.clip.build_clip_tokenizer); None takes that of an installed open_clip or clip.
        autoencoder: a local folder with the autoencoder of the latents; it can be named later as well.
        use: which weights of a snapshot.

    Raises:
        UserError: the weights are not the released network's, the vocabulary does not fit, or `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; name a new folder for the run")
    path = local_path(weights)
    tensors, given = _read_folder(path, use) if path.is_dir() else _read_snapshot(path, use)
    model = official.model_from_config({**official.config_from_tensors(tensors), **given})
    ours = {name: tensor.float() for name, tensor in official.from_official(tensors, model).items()}
    words = build_clip_tokenizer(Path(tokenizer) if tokenizer else _installed_vocabulary())
    vocabulary = official.vocabulary(model)
    if words.get_vocab_size() != vocabulary:
        raise UserError(
            f"the vocabulary has {words.get_vocab_size()} ids, and the released weights {vocabulary}; give CLIP's own"
        )
    predicted = official.predicted_of(tensors)
    headless = [name for name, modality in model.modalities.items() if modality.tower_depth and name not in predicted]
    if headless or not predicted:
        raise UserError(f"{weights} has no {' and no '.join(headless or (TEXT, IMAGE))} head; the file is not whole")
    run = _run(model, predicted, out, None if autoencoder is None else str(Path(autoencoder).absolute()))
    out.mkdir(parents=True, exist_ok=True)
    words.save(str(out / TOKENIZER))
    _write_checkpoint(run, ours)
    run.paths.stage(run.stages[0].name).done.touch()
    run.paths.run.write_text(dump_run(run), encoding="utf-8")
    return predicted


def export_paper(source: str, out: Path, weights: Literal["ema", "raw"] = "ema") -> None:
    """Write a run's, a checkpoint's or an export's weights as a Hugging Face folder of the released code.

    Raises:
        UserError: nothing loadable is there, its network is not of the released kind, or `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; name a new folder for the export")
    loaded = load(source, weights)
    config = official.config_from_model(loaded.model, loaded.predicted)
    ours = {name: parameter.detach() for name, parameter in loaded.module.named_parameters()}
    tensors = official.to_official(ours, loaded.model)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / WEIGHTS, metadata={"format": "pt"})
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- reading


def _read_folder(folder: Path, use: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if use != "ema":
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


def _read_snapshot(path: Path, use: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A dict with the state dicts `model` and `ema`, or one state dict alone."""
    try:
        snapshot = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a Hugging Face folder, hf:ORG/NAME or a snapshot (.pt)") from None
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is no snapshot that can be read without running code out of it: {reason}") from None
    key = {"ema": "ema", "raw": "model"}[use]
    found = snapshot if _is_state(snapshot) else snapshot.get(key) if isinstance(snapshot, Mapping) else None
    if found is None or not _is_state(found):
        held = ", ".join(map(str, snapshot)) if isinstance(snapshot, Mapping) else type(snapshot).__name__
        raise UserError(f"{path} has no tensors by name under `{key}` (it holds {held}); try --use {_OTHER[use]}")
    return _plain_names(found), _config_beside(path.parent)


_OTHER = {"ema": "raw", "raw": "ema"}


def _is_state(found: Any) -> bool:
    return isinstance(found, Mapping) and bool(found) and all(isinstance(value, Tensor) for value in found.values())


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_plain(name): tensor for name, tensor in tensors.items()}


def _plain(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return _plain(name.removeprefix(prefix))
    return name


def _config_beside(folder: Path) -> dict[str, Any]:
    """What config.json or mmdit.yaml says; nothing where neither is there, as the weights' shapes tell as much."""
    for name in (CONFIG, NETWORK):
        path = folder / name
        if path.exists():
            try:
                tree = yaml.safe_load(path.read_text(encoding="utf-8"))  # which reads JSON as well
            except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
                raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
            if not isinstance(tree, dict):
                raise UserError(f"{path} must hold names and values")
            return official.known_values(tree)
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


def _run(model: Model, predicted: tuple[str, ...], out: Path, autoencoder: str | None) -> Run:
    """The run that these weights could have come from, with the settings of the released code."""
    out = out.absolute()
    caption = CaptionField(tokenizer=str(out / TOKENIZER), cleaning="clip")
    stage = Stage(
        name=STAGE,
        steps=600_000,
        modalities={name: StageModality(predicted=name in predicted) for name in (TEXT, IMAGE)},
        batch=Batching(global_samples=256, micro_batch=32),
        optimizer=Optimizer(
            learning_rate=2e-4, betas=(0.9, 0.9), weight_decay=0.03, decay_all=True, warmup_steps=2500, gradient_clip=1.0
        ),
        antithetic_times=False,
        ema={"main": ConstantEma(decay=0.9999, warmup=False)},
    )
    data = Data(train=str(out / NO_DATA), fields={TEXT: caption, IMAGE: LatentField(autoencoder=autoencoder)})
    return Run(name="paper", folder=str(out), model=model, data=data, stages=(stage,))


def _write_checkpoint(run: Run, tensors: Mapping[str, Tensor]) -> None:
    """Step 0 of the run's stage. Nothing in it counts as trained here: then a checkpoint holds neither moments nor averages,
    and its averages are its weights."""
    stage = run.stages[0]
    checkpoints = run.paths.stage(stage.name).checkpoints
    checkpoint.begin(checkpoints, 0)
    flat = {tensor_key("weight", name): tensor.flatten() for name, tensor in tensors.items()}
    ranges = {name: (0, tensor.numel()) for name, tensor in tensors.items()}
    entry = checkpoint.write_rank_file(checkpoints.partial(0), 0, flat, ranges)
    manifest = Manifest(
        stage=stage.name,
        parameters={name: (tuple(tensor.shape), False) for name, tensor in tensors.items()},
        ema=tuple(stage.ema),
        progress={"optimizer_step": 0},
        config=dump_run(run),
        files=(entry,),
    )
    checkpoint.publish(checkpoints, 0, manifest, stage.checkpoint)
