"""One rank of plain DeepSpeed: an MMDiT and torch's AdamW without our engine, on the batches of a stage of tests/tiny.yaml.

Loads a universal checkpoint or starts fresh, trains, saves; prints as one JSON line what it saw.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from megadiff.config.derived import learning_rate
from megadiff.config.layout import Layout
from megadiff.config.load import load_run
from megadiff.config.parameters import is_trained
from megadiff.config.schema import Run, Stage
from megadiff.diffusion.objective import DiffusionObjective
from megadiff.distributed.ranks import Ranks
from megadiff.engine.start import start_process_group
from megadiff.engine.statistics import normaliser_of
from megadiff.models.mmdit import build_model
from megadiff.models.names import decayed_names, part_of
from megadiff.training import loop
from megadiff.training.progress import Progress
from megadiff.training.stages import stage_seed
from megadiff.weights.checkpoint import MOMENTS, CheckpointReader


def main(request: dict[str, Any]) -> None:
    run = load_run("tests/tiny.yaml", [f"folder={request['folder']}", *request["overrides"]])
    stage, ranks = run.stage("first"), Ranks.from_environment()
    start_process_group(ranks)
    layout = Layout(ranks.rank, ranks.world)
    engine = plain_engine(run, stage, layout, request["zero"])
    seen: dict[str, Any] = {}
    progress = Progress()
    if "load" in request:
        source = Path(request["load"])
        path, _ = engine.load_checkpoint(str(source))
        assert path is not None
        repair(engine, source / (source / "latest_universal").read_text())
        reader = CheckpointReader(Path(request["ours"]))
        progress = Progress.of(reader.manifest.progress)
        seen["differing"] = differing(engine, reader)
        seen["adam_steps"] = sorted({float(state["step"]) for state in engine.basic_optimizer.state.values()})
        seen["decays"] = sorted(group["weight_decay"] for group in engine.basic_optimizer.param_groups)
    seen["losses"] = list(train(engine, run, stage, layout, progress, request["steps"]))
    seen["scheduled"] = engine.lr_scheduler.last_batch_iteration + 1
    if "after" in request:
        seen["differing_after"] = differing(engine, CheckpointReader(Path(request["after"])), tolerance=1e-4)
    if "save" in request:
        save(engine, Path(request["save"]), layout)
    print(json.dumps(seen))


def plain_engine(run: Run, stage: Stage, layout: Layout, zero: int) -> Any:
    config = {
        "train_batch_size": stage.batch.global_samples,
        "train_micro_batch_size_per_gpu": stage.batch.micro_batch,
        "gradient_clipping": stage.optimizer.gradient_clip,
        "zero_optimization": {"stage": zero},
        "zero_force_ds_cpu_optimizer": False,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": stage.optimizer.learning_rate, "warmup_num_steps": 2}},
        "checkpoint": {"load_universal": True},
    }
    module = build_model(run.model, ["text", "image"], seed=11)  # other weights than any stage starts from
    if zero == 3:
        deepspeed.zero.Init(module, config_dict_or_path=config)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(is_trained(part_of(name), stage))
    decayed = set(decayed_names(module))
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    groups = [  # in the other order than our engine's
        {"params": [parameter for name, parameter in trained if name not in decayed], "weight_decay": 0.0},
        {"params": [parameter for name, parameter in trained if name in decayed], "weight_decay": stage.optimizer.weight_decay},
    ]
    optimizer = torch.optim.AdamW(groups, betas=stage.optimizer.betas, eps=stage.optimizer.eps)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]


def repair(engine: Any, folder: Path) -> None:
    """What DeepSpeed 0.19.8 leaves undone after `load_universal`."""
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:  # never loaded
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
                parameter.data.copy_(torch.load(folder / "zero" / name / "fp32.pt", weights_only=True)["param"])
    for state in engine.basic_optimizer.state.values():  # ZeRO-3 gives all groups one tensor, which each would count up
        state["step"] = state["step"].clone()


def differing(engine: Any, reader: CheckpointReader, tolerance: float = 0.0) -> list[str]:
    """The weights and moments of the engine that are not those of a checkpoint of ours. Collective."""
    found = []
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                held = {"weight": parameter.detach().clone()}
        else:
            held = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}
            held["weight"] = safe_get_full_fp32_param(parameter)
        for kind, values in held.items():
            ours = reader.read_whole(kind, name)
            if not torch.allclose(values.reshape(ours.shape), ours, rtol=tolerance, atol=tolerance * float(ours.abs().max())):
                found.append(f"{kind}:{name}")
    return found


def train(engine: Any, run: Run, stage: Stage, layout: Layout, progress: Progress, steps: int) -> Any:
    """The global loss of each step."""
    seed = stage_seed(run, stage)
    objective = DiffusionObjective(run.model, stage, seed)
    loader = loop.loader_of(run, stage, layout, seed, progress)
    accumulation = engine.gradient_accumulation_steps()
    for step in range(progress.optimizer_step, progress.optimizer_step + steps):
        for group in engine.basic_optimizer.param_groups:
            group["lr"] = learning_rate(stage.optimizer, step, stage.steps)
        prepared = [objective.prepare(batch) for batch in loader.take(engine.device)]
        normaliser = normaliser_of(prepared, objective.losses, layout, accumulation, engine.device)
        total = torch.zeros(())
        for one in prepared:
            loss = objective.score(engine(one.noised, one.readout), one, normaliser).total
            engine.backward(loss)
            engine.step()
            total += loss.detach() / accumulation / layout.data_ranks
        torch.distributed.all_reduce(total)
        yield float(total)
    loader.close()


def save(engine: Any, folder: Path, layout: Layout) -> None:
    """A checkpoint of DeepSpeed's, turned into a universal one by DeepSpeed, and the weights that it should hold."""
    weights = {name: safe_get_full_fp32_param(parameter) for name, parameter in engine.module.named_parameters()}
    engine.save_checkpoint(str(folder), tag="plain")
    if layout.leads:
        frozen = {name: parameter for name, parameter in engine.module.named_parameters() if not parameter.requires_grad}
        torch.save(
            {name: frozen.get(name) if value is None else value for name, value in weights.items()}, folder / "weights.pt"
        )
        options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
        paths = {"input_folder": str(folder / "plain"), "output_folder": str(folder / "universal")}
        ds_to_universal.main(Namespace(**paths, **options, inject_missing_state=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
