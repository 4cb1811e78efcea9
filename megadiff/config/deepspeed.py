"""DeepSpeed's JSON resolved against a stage. Torch-free.

A number has one owner. Batch, accumulation, clipping and precision belong to the stage, so the JSON says "auto" (or
nothing) for them; how the ranks share the work (ZeRO stage, buckets, offload) belongs to the JSON.
The known keys are those of DeepSpeed 0.19.8; a test compares the ZeRO ones with the installed package.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megadiff.config import layouts
from megadiff.config.derived import accumulation, lanes_per_rank
from megadiff.config.errors import ConfigError
from megadiff.config.parameters import layers
from megadiff.config.schema import Model, Run, Stage

Tree = dict[str, Any]

AUTO = "auto"
DEFAULT_BUCKET = 500_000_000
"""Numbers in DeepSpeed's buckets of gradients and weights, if the JSON does not say."""
BUCKET_MULTIPLE = 1024
"""ZeRO-1 and 2 refuse odd buckets."""
OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16.enabled",
)
"""The numbers that the stage owns; only they may be "auto"."""

_REMOVED = "was removed in DeepSpeed 0.19; delete it"
_STAGE_OWNS_OPTIMIZER = "the stage YAML owns the optimizer and its schedule (stages.NAME.optimizer); delete it"
_LATER = "is not supported by this version of megadiff; delete it"
REFUSED: Mapping[str, str] = {
    "nebula": _REMOVED,
    "compression_training": _REMOVED,
    "amp": _REMOVED,
    "quantize_training": _REMOVED,
    "sparse_gradients": _REMOVED,
    "sparse_attention": _REMOVED,
    "eigenvalue": _REMOVED,
    "elasticity": _REMOVED,
    "graph_harvesting": _REMOVED,
    "curriculum_learning": _REMOVED,
    "progressive_layer_drop": _REMOVED,
    "optimizer": _STAGE_OWNS_OPTIMIZER,
    "scheduler": _STAGE_OWNS_OPTIMIZER,
    "torch_autocast": "the stage YAML owns the precision (stages.NAME.precision: bf16, fp32 or auto); delete it",
    "data_efficiency": "the order of samples is megadiff's own (section data of the run); delete it",
    "activation_checkpointing": "the stage YAML owns it (stages.NAME.activation_checkpointing); delete it",
    "checkpoint": "checkpoints are megadiff's own (stages.NAME.checkpoint); delete it",
    "dataloader_drop_last": "samples are loaded by megadiff's own loader; delete it",
    "autotuning": _LATER,
    "compile": _LATER,
    "hybrid_engine": _LATER,
    "tensor_parallel": "it starts DeepSpeed's own splitting; write tensor_model_parallel_size: T instead",
    "expert_parallel": _LATER,
    "sequence_parallel_size": _LATER,
    "weight_quantization": _LATER,
}
"""Blocks that the JSON must not have, and why."""

_OFFLOAD = 'is deprecated; use offload_optimizer or offload_param: {"device": "cpu"}'
REFUSED_ZERO: Mapping[str, str] = {
    "mics_shard_size": _REMOVED,
    "mics_hierarchical_params_gather": _REMOVED,
    "zeropp_loco_param": _REMOVED,
    "cpu_offload": _OFFLOAD,
    "cpu_offload_param": _OFFLOAD,
    "cpu_offload_use_pin_memory": _OFFLOAD,
    "zenflow": _LATER,
    "zero_hpz_partition_size": _LATER,
    "zero_quantized_weights": _LATER,
    "zero_quantized_nontrainable_weights": _LATER,
    "zero_quantized_gradients": _LATER,
    "parameter_alignment": _LATER,
    "save_muon_momentum_buffer_in_memory": _LATER,
}
"""Keys that zero_optimization must not have, and why."""

KNOWN = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "zero_optimization",
    layouts.PIPELINE,
    layouts.TENSOR,
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "data_types",
    "prescale_gradients",
    "gradient_predivide_factor",
    "gradient_allreduce_op",
    "disable_allgather",
    "disable_python_gc",
    "managed_gradient_accumulation",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "log_level",
    "flops_profiler",
    "comms_logger",
    "timers",
    "aio",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
)

KNOWN_ZERO: Mapping[str, str] = {
    "stage": "number",
    **dict.fromkeys(
        (
            "reduce_bucket_size",
            "allgather_bucket_size",
            "sub_group_size",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "stage3_model_persistence_threshold",
            "stage3_module_granularity_threshold",
            "max_live_parameters",
            "max_reuse_distance",
            "prefetch_bucket_size",
            "param_persistence_threshold",
            "model_persistence_threshold",
            "module_granularity_threshold",
        ),
        "number",
    ),
    **dict.fromkeys(
        (
            "contiguous_gradients",
            "reduce_scatter",
            "use_multi_rank_bucket_allreduce",
            "allgather_partitions",
            "overlap_comm",
            "load_from_fp32_weights",
            "elastic_checkpoint",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_gather_fp16_weights_on_model_save",
            "stage3_use_all_reduce_for_fetch_params",
            "stage3_allgather_sequential",
            "gather_16bit_weights_on_model_save",
            "use_all_reduce_for_fetch_params",
            "allgather_sequential",
            "ignore_unused_parameters",
            "legacy_stage1",
            "round_robin_gradients",
            "memory_efficient_linear",
            "pipeline_loading_checkpoint",
            "override_module_apply",
            "log_trace_cache_warnings",
            "enable_sanity_checks",
            "compute_grad_norm",
        ),
        "flag",
    ),
    "offload_param": "block",
    "offload_optimizer": "block",
    "leaf_module": "block",
}
"""Keys of zero_optimization and what they hold."""


FLOAT32_NAMES = ("fp32", "float32", "float", "torch.float32")
"""What DeepSpeed calls float32."""

KNOWN_BF16 = (
    "enabled",
    "immediate_grad_update",
    "check_grad_overflow",
)
"""Keys of bf16. Its low-precision master weights and optimizer states are excluded: checkpoints and averages are fp32."""


def load_deepspeed(path: str | Path) -> Tree:
    """Read a DeepSpeed JSON and check what needs no stage.

    Raises:
        ConfigError: the file is missing or is no JSON, or `check` refuses it.
    """
    path = Path(path)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give a DeepSpeed JSON such as ds_configs/zero3.json") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; give a DeepSpeed JSON such as ds_configs/zero3.json") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno} is not valid JSON: {error.msg}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a JSON object, as ds_configs/zero3.json does")
    try:
        check(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return tree


def check(tree: Tree) -> None:
    """Everything that is wrong with a tree whatever the stage, in one error.

    Raises:
        ConfigError: a block is refused, a key unknown, or a value of the wrong kind.
    """
    faults = [f"{key}: {reason}" for key, reason in REFUSED.items() if key in tree]
    faults += [_unknown(key, KNOWN) for key in tree if key not in KNOWN and key not in REFUSED]
    for block in ("bf16", "fp16", "zero_optimization", "data_types"):
        if not isinstance(tree.get(block, {}), dict):
            faults.append(f"{block} must be a block {{...}}, not {json.dumps(tree[block])}")
    if not faults:
        faults += [_unknown(key, KNOWN_BF16, "bf16.") for key in tree.get("bf16", {}) if key not in KNOWN_BF16]
        faults += _fp16_faults(tree) + _zero_faults(tree.get("zero_optimization", {})) + _misplaced_auto(tree, ())
        faults += layouts.faults(tree)
        if tree.get("gradient_allreduce_op", "mean") != "mean":
            faults.append("gradient_allreduce_op must be mean: losses are scaled for an average over ranks")
        faults += [
            f"{block}.{key} must be true: a step whose gradient is not finite is recognised by it"
            for block, key in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm"))
            if tree.get(block, {}).get(key) is False
        ]
        summed = tree.get("data_types", {}).get("grad_accum_dtype")
        if summed not in (None, *FLOAT32_NAMES):
            faults.append(
                f"data_types.grad_accum_dtype is {json.dumps(summed)}; it must be fp32, or be left out: ZeRO-2 over several "
                "ranks adds gradients up in fp32 in any case, and others do so in the precision of the stage YAML"
            )
        if tree.get("zero_force_ds_cpu_optimizer") and "offload_optimizer" in tree.get("zero_optimization", {}):
            faults.append(
                "zero_force_ds_cpu_optimizer must be false: the optimizer is torch's AdamW, built from the stage YAML"
            )
    if faults:
        raise ConfigError("; ".join(faults))


def resolve(tree: Mapping[str, Any], stage: Stage, *, data_ranks: int, accelerator: bool) -> Tree:
    """The tree that DeepSpeed gets: every "auto" filled in from the stage, without the keys that are megadiff's own.

    Args:
        data_ranks: ranks that read different samples.
        accelerator: the ranks run on GPUs; precision `auto` is then bf16, on a CPU fp32.

    Raises:
        ConfigError: `check` refuses the tree, the batch does not divide, or a number contradicts the stage's.
    """
    check(dict(tree))
    resolved = layouts.without_sizes(tree)
    precision = stage.precision
    if precision == AUTO:
        precision = "bf16" if accelerator else "fp32"
    where = f"stages.{stage.name}"
    owners: dict[str, tuple[Any, str]] = {
        "train_batch_size": (stage.batch.global_samples, f"{where}.batch.global_samples"),
        "train_micro_batch_size_per_gpu": (stage.batch.micro_batch, f"{where}.batch.micro_batch"),
        "gradient_accumulation_steps": (
            accumulation(stage, data_ranks),
            f"{where}.batch (global_samples / micro_batch / {data_ranks} ranks)",
        ),
        "gradient_clipping": (stage.optimizer.gradient_clip, f"{where}.optimizer.gradient_clip"),
        "bf16.enabled": (
            precision == "bf16",
            f"{where}.precision ({stage.precision}, so {precision} on {'an accelerator' if accelerator else 'a CPU'})",
        ),
    }
    faults = [fault for key in OWNED if (fault := _settle(resolved, key, *owners[key]))]
    if faults:
        raise ConfigError("; ".join(faults))
    if "offload_optimizer" in resolved.get("zero_optimization", {}):
        resolved.setdefault("zero_force_ds_cpu_optimizer", False)
    return resolved


def resolve_run(tree: Mapping[str, Any], run: Run, *, ranks: int, accelerator: bool) -> dict[str, Tree]:
    """`resolve` for every stage, by stage name, on this many ranks.

    Raises:
        ConfigError: the faults of all stages, each once; or the ranks do not divide into the layout, or the lanes.
    """
    check(dict(tree))
    layout = layouts.layout_of(tree, ranks)
    data_ranks = layout.data_ranks
    faults = dict.fromkeys(fault for stage in run.stages for fault in layouts.misfits(run.model, stage, layout))
    try:
        lanes_per_rank(run, data_ranks)
    except ConfigError as error:
        faults[str(error)] = None
    resolved = {}
    for stage in run.stages:
        try:
            own = resolve(tree, stage, data_ranks=data_ranks, accelerator=accelerator)
            resolved[stage.name] = fit_buckets(own, run.model, stage)
        except ConfigError as error:
            faults[str(error)] = None
    if faults:
        raise ConfigError("; ".join(faults))
    return resolved


def fit_buckets(tree: Tree, model: Model, stage: Stage) -> Tree:
    """A resolved tree with buckets no larger than the stage's gradients, since DeepSpeed allocates them whole."""
    zero = tree.get("zero_optimization", {})
    trained = sum(layer.trained.total for layer in layers(model, stage))
    numbers = max(1, -(-trained // BUCKET_MULTIPLE)) * BUCKET_MULTIPLE
    fitted = {key: min(int(zero.get(key, DEFAULT_BUCKET)), numbers) for key in ("reduce_bucket_size", "allgather_bucket_size")}
    return {**tree, "zero_optimization": {**zero, **fitted}}


def zero_stage(tree: Mapping[str, Any]) -> int:
    """The ZeRO stage, 0 to 3; DeepSpeed's default is 0."""
    return int(tree.get("zero_optimization", {}).get("stage", 0))


def _settle(tree: Tree, key: str, value: Any, owner: str) -> str | None:
    """Write the stage's value where the JSON leaves it open; a sentence if the JSON says something else."""
    *blocks, name = key.split(".")
    node = tree
    for block in blocks:
        node = node.setdefault(block, {})
    given = node.get(name, AUTO)
    if given == AUTO:
        node[name] = value
        return None
    # bool is an int in Python: 1 for true would pass unseen.
    if isinstance(given, bool) == isinstance(value, bool) and given == value:
        return None
    return (
        f"{key} is {json.dumps(given)} in the DeepSpeed JSON and {json.dumps(value)} by {owner}; "
        f'write "auto" in the JSON, the stage owns this value'
    )


def _fp16_faults(tree: Tree) -> list[str]:
    if tree.get("fp16", {}).get("enabled", False) is False:
        return []
    return [
        "fp16: loss scaling skips steps and squeezes the small gradients of late times to zero; "
        "use stages.NAME.precision: bf16 or fp32, and delete the block"
    ]


def _zero_faults(zero: Tree) -> list[str]:
    faults = [f"zero_optimization.{key}: {reason}" for key, reason in REFUSED_ZERO.items() if key in zero]
    faults += [
        _unknown(key, KNOWN_ZERO, "zero_optimization.") for key in zero if key not in KNOWN_ZERO and key not in REFUSED_ZERO
    ]
    for key, value in zero.items():
        kind = KNOWN_ZERO.get(key)
        if value != AUTO and kind is not None and not _is_of_kind(value, kind):
            faults.append(f"zero_optimization.{key} is {json.dumps(value)}; it must be {_KINDS[kind]}")
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool | float):
        faults.append(f"zero_optimization.stage is {json.dumps(stage)}; it must be 0, 1, 2 or 3")
    elif stage < 3 and "offload_param" in zero:
        faults.append(f"zero_optimization.offload_param needs stage 3, not {stage}")
    elif stage == 0 and "offload_optimizer" in zero:
        faults.append("zero_optimization.offload_optimizer needs stage 1, 2 or 3, not 0")
    return faults + [fault for name in OFFLOAD_BLOCKS for fault in _offload_faults(name, zero.get(name))]


OFFLOAD_BLOCKS = ("offload_param", "offload_optimizer")
KNOWN_OFFLOAD = (
    "device",
    "pin_memory",
    "buffer_count",
    "buffer_size",
    "max_in_cpu",
    "fast_init",
    "ratio",
    "pipeline_read",
    "pipeline_write",
)


def _offload_faults(name: str, block: Any) -> list[str]:
    if not isinstance(block, dict):
        return []
    place = f"zero_optimization.{name}."
    faults = [_unknown(key, KNOWN_OFFLOAD, place) for key in block if key not in KNOWN_OFFLOAD]
    if block.get("device", "none") not in ("none", "cpu"):
        faults.append(f'{place}device is {json.dumps(block["device"])}; it must be "cpu" or "none"')
    return faults


_KINDS = {"number": "a number", "flag": "true or false", "block": "a block {...}"}


def _is_of_kind(value: Any, kind: str) -> bool:
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, bool if kind == "flag" else dict)


def _misplaced_auto(node: Any, path: tuple[str, ...]) -> list[str]:
    place = ".".join(path)
    if isinstance(node, dict):
        return [fault for key, value in node.items() for fault in _misplaced_auto(value, (*path, key))]
    if node == AUTO and place not in OWNED:
        return [f'{place} is "auto", which only {", ".join(OWNED)} may be; give a value or delete it']
    return []


def _unknown(key: str, known: Collection[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
    return f"unknown key {prefix}{key}; {hint}"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> Tree:
    tree: Tree = {}
    for key, value in pairs:
        if key in tree:
            raise ConfigError(f"the key {key} stands twice in one block; keep one")
        tree[key] = value
    return tree
