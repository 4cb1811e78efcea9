"""Training snapshots of the released code: AdamW's moments and the step, under our names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megadiff.cli import main as cli
from megadiff.config.errors import UserError
from megadiff.config.load import load_run
from megadiff.config.run_folder import CheckpointsFolder
from megadiff.interfaces.paper import export_paper, import_paper
from megadiff.weights.checkpoint import MOMENTS, CheckpointReader
from megadiff.weights.loading import load
from megadiff.weights.official import from_official
from megadiff.weights.official_config import model_from_config
from tests.interfaces.test_paper import CONFIG, same_network, words
from tests.weights.released import PROJECTING, UNEQUAL, released_state

pytestmark = pytest.mark.thorough

__all__ = ["words"]  # a fixture
ADAM_STEPS, ITERATIONS = 3, 7
FROZEN_BY = {
    "joint": ("text_embedder", "text_pos_embed", "text_time", "image_embedder", "image_time", "joint_embedding"),
    "image": ("image_embedder", "image_time", "image_dit", "image_final"),
    "text": ("text_embedder", "text_pos_embed", "text_time", "text_dit", "text_final"),
}


class Released:
    """A network with the released names and its optimizer, as the released code sets it up; gradients are drawn."""

    def __init__(self, config: Mapping[str, Any], freeze: tuple[str, ...] = ()) -> None:
        self.config, self.state = config, released_state(dict(config), seed=1)
        frozen = tuple(prefix for flag in freeze for prefix in FROZEN_BY[flag])
        if not config["text_depth"]:  # freeze_last_block(0)
            last = f"joint_embedding.blocks.{config['depth'] - 1}."
            frozen += (f"{last}joint_attn.to_out.0", f"{last}feedforwards.0", f"{last}ff_layernorms.0")
            frozen += (f"{last}cond_dict.cond_linear_0", "joint_embedding.norms.0")
        second = [name for name in self.state if "to_post_branch_gammas" in name]
        own = [name for name in self.state if name not in second and name != "pos_embed"]
        self.parameters = {name: nn.Parameter(self.state[name].clone()) for name in own if not name.startswith(frozen)}
        self.unread = {name for name in self.parameters if "hidden_projection" in name}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=2e-4, betas=(0.9, 0.9), weight_decay=0.03)
        for group in self.optimizer.param_groups:
            group["initial_lr"], group["betas"] = 1e-3, [0.9, 0.9]  # as a scheduler leaves it

    def step(self, seed: int) -> dict[str, Tensor]:
        """One step; returns the gradients by name."""
        generator = torch.Generator().manual_seed(seed)
        gradients = {name: torch.randn(p.shape, generator=generator) for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.grad = None if name in self.unread else gradients[name]
        self.optimizer.step()
        return gradients

    def weights(self) -> dict[str, Tensor]:
        """The state dict as it is now."""
        now = {**self.state, **{name: parameter.detach().clone() for name, parameter in self.parameters.items()}}
        return {name: now[first_name(name)].clone() for name in self.state}

    def snapshot(self, **changes: Any) -> dict[str, Any]:
        averages = {name: tensor * 0.5 if name in self.parameters else tensor for name, tensor in self.weights().items()}
        averages = {name: averages[first_name(name)].clone() for name in self.state}
        scheduler = {"last_epoch": ITERATIONS, "warmup_steps": 5, "base_lrs": [1e-3], "_last_lr": [1e-3]}
        whole = {
            "model": self.weights(),
            "ema": averages,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": scheduler,
        }
        return {**whole, **changes}


def first_name(name: str) -> str:
    return name.replace("to_post_branch_gammas", "cond_linear").replace(".2.", ".") if "to_post" in name else name


def trained(config: Mapping[str, Any], freeze: tuple[str, ...] = ()) -> Released:
    released = Released(config, freeze)
    for seed in range(ADAM_STEPS):
        released.step(seed)
    return released


def imported(snapshot: Mapping[str, Any], folder: Path, words: str, **options: Any) -> Path:
    torch.save(dict(snapshot), folder / "snapshot.pt")
    import_paper(folder / "snapshot.pt", folder / "run", tokenizer=words, autoencoder=None, **options)
    return folder / "run"


def reader_of(run: Path) -> CheckpointReader:
    folder = CheckpointsFolder(run / "released/checkpoints").newest()
    assert folder is not None
    return CheckpointReader(folder)


KINDS = [
    ({}, ()),
    ({"text_depth": 0}, ()),
    ({**UNEQUAL, **PROJECTING}, ()),
    ({}, ("joint",)),
    ({}, ("joint", "image")),
]


@pytest.mark.parametrize(("changes", "freeze"), KINDS)
def test_the_next_step_from_the_imported_moments_is_the_released_codes(words, tmp_path, changes, freeze):
    released = trained({**CONFIG, **changes}, freeze)
    run = imported(released.snapshot(), tmp_path, words)
    reader, model = reader_of(run), load_run(run / "run.yaml").model
    names = [name for name, (_, is_trained) in reader.manifest.parameters.items() if is_trained]
    ours = {name: nn.Parameter(reader.read_whole("weight", name)) for name in names}
    optimizer = torch.optim.AdamW(ours.values(), lr=2e-4, betas=(0.9, 0.9), weight_decay=0.03)
    steps = torch.tensor(float(reader.manifest.progress["adam_steps"]))
    for name, parameter in ours.items():
        moments = {kind: reader.read_whole(kind, name) for kind in MOMENTS}
        optimizer.state[parameter] = {"step": steps.clone(), **moments}
    gradients = released.step(99)
    nothing = {name: torch.zeros_like(tensor) for name, tensor in released.state.items()}
    nothing["pos_embed"] = released.state["pos_embed"]
    theirs = from_official({**nothing, **gradients, **second_names(gradients)}, model)
    wanted = from_official(released.weights(), model)
    for name, parameter in ours.items():
        parameter.grad = theirs[name]
    optimizer.step()
    compared = 0
    for name, parameter in ours.items():
        touched = theirs[name] != 0  # what was frozen there, or unread, has no gradient
        torch.testing.assert_close(parameter[touched], wanted[name][touched], rtol=1e-6, atol=1e-7)
        compared += int(touched.sum())
    assert compared == sum(g.numel() for name, g in gradients.items() if name not in released.unread)
    assert set(wanted) - set(ours) == {name for name in wanted if not reader.manifest.parameters[name][1]}


def second_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {name: first_name(name) for name in released_state(CONFIG)}
    return {name: tensors[first].clone() for name, first in names.items() if name != first and first in tensors}


def test_the_run_goes_on_at_the_snapshots_step_with_its_settings(words, tmp_path):
    from megadiff.training.progress import Progress

    run = imported(trained(CONFIG).snapshot(), tmp_path, words)
    reader, stage = reader_of(run), load_run(run / "run.yaml").stages[0]
    assert reader.folder.name == f"step_{ITERATIONS:08d}"
    progress = reader.manifest.progress
    assert (progress["optimizer_step"], progress["adam_steps"], progress["ema_updates"]) == (ITERATIONS, ADAM_STEPS, ITERATIONS)
    assert set(vars(Progress())) <= set(progress)
    settings = stage.optimizer
    assert (settings.learning_rate, settings.betas, settings.weight_decay) == (1e-3, (0.9, 0.9), 0.03)
    assert (settings.warmup_steps, settings.decay_all, stage.freeze) == (5, True, ())
    assert not (run / "released/DONE").exists()


def test_a_training_that_has_all_its_steps_is_done(words, tmp_path):
    run = imported(trained(CONFIG).snapshot(scheduler={"last_epoch": 600_000}), tmp_path, words)
    assert (run / "released/DONE").exists()
    assert load_run(run / "run.yaml").stages[0].optimizer.warmup_steps == 2500


@pytest.mark.parametrize(("freeze", "parts"), [(("joint",), ("joint",)), (("joint", "image"), ("joint", "image"))])
def test_what_was_frozen_is_frozen_again(words, tmp_path, freeze, parts):
    assert load_run(imported(trained(CONFIG, freeze).snapshot(), tmp_path, words) / "run.yaml").stages[0].freeze == parts


@pytest.mark.parametrize("changes", [{}, {"text_depth": 0}])
def test_both_sets_of_weights_come_back(words, tmp_path, changes):
    snapshot = trained({**CONFIG, **changes}).snapshot()
    run = imported(snapshot, tmp_path, words)
    assert same_network(snapshot["ema"], run, "ema")
    assert same_network(snapshot["model"], run, "raw")
    assert load(str(run)).predicted == (("image",) if changes else ("text", "image"))


@pytest.mark.parametrize("use", ["ema", "raw"])
def test_weights_that_are_asked_for_are_taken_alone(words, tmp_path, use):
    snapshot = trained(CONFIG).snapshot()
    run = imported(snapshot, tmp_path, words, use=use)
    assert same_network(snapshot["model" if use == "raw" else "ema"], run)
    assert reader_of(run).manifest.progress == {"optimizer_step": 0}
    assert (run / "released/DONE").exists()


def test_the_command_line_says_where_training_goes_on(words, tmp_path, capsys):
    torch.save(trained(CONFIG).snapshot(), tmp_path / "snapshot.pt")
    assert cli.main(["import-paper", str(tmp_path / "snapshot.pt"), str(tmp_path / "run"), "--vocabulary", words]) == 0
    assert "(predicts text and image; training goes on at step 7)" in capsys.readouterr().out
    export_paper(str(tmp_path / "run"), tmp_path / "out")


def changed(optimizer: dict[str, Any], **group: Any) -> dict[str, Any]:
    return {"state": optimizer["state"], "param_groups": [{**optimizer["param_groups"][0], **group}]}


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda state: changed(state, params=[0, 1]), "its optimizer has 2 parameters, which are not those of its network"),
        (lambda state: {**state, "state": {0: {"step": 1}}}, "is not that of the released code"),
        (lambda state: {**state, "param_groups": state["param_groups"] * 2}, "is not that of the released code"),
        (lambda state: {**state, "state": {3: state["state"][0]}}, "are not those of its network, whatever was frozen"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused_in_a_sentence(words, tmp_path, break_it, said):
    released = trained(CONFIG)
    snapshot = released.snapshot(optimizer=break_it(released.optimizer.state_dict()))
    with pytest.raises(UserError, match=said) as caught:
        imported(snapshot, tmp_path, words)
    assert "take its weights alone by --use ema or --use raw" in str(caught.value)
    assert "\n" not in str(caught.value)
    imported(snapshot, tmp_path, words, use="ema")


@pytest.mark.parametrize("freeze", [("image",), ("text",), ("image", "text")])
def test_frozen_embeddings_under_trained_joint_blocks_are_refused(words, tmp_path, freeze):
    with pytest.raises(UserError, match="but without --freeze_joint"):
        imported(trained(CONFIG, freeze).snapshot(), tmp_path, words)


def test_averages_of_frozen_weights_that_are_others_are_refused(words, tmp_path):
    snapshot = trained(CONFIG, ("joint",)).snapshot()
    snapshot["ema"]["text_embedder.weight"] = snapshot["ema"]["text_embedder.weight"] + 1
    with pytest.raises(UserError, match=r"embed.states.text.weight was frozen .* and its average is not its weight"):
        imported(snapshot, tmp_path, words)


def test_the_model_of_the_run_is_the_snapshots(words, tmp_path):
    config = {**CONFIG, **UNEQUAL, **PROJECTING}
    assert load_run(imported(trained(config).snapshot(), tmp_path, words) / "run.yaml").model == model_from_config(config)
