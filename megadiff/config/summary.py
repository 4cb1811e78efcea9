"""The derived numbers of a run's stages in one tree. Torch-free."""

from __future__ import annotations

from typing import Any

from megadiff.config.activations import Precision
from megadiff.config.derived import accumulation, flops_per_sample, lanes_per_rank, tokens
from megadiff.config.footprint import Plan, bubble, bytes_per_rank, bytes_sent_per_step, fullest, imbalance
from megadiff.config.layout import Layout
from megadiff.config.parameters import idle, is_trained, predicted, stage_parameters, trainable
from megadiff.config.schema import Run, Stage


def summary(run: Run, stage: Stage, data_ranks: int) -> dict[str, Any]:
    """The derived numbers of a stage as `check-config --json` prints them, for any DeepSpeed JSON.

    Bytes are those of each ZeRO stage without other parallelism, with DeepSpeed's defaults; where the stage's precision is
    `auto`, in bf16 (an accelerator).

    Raises:
        ConfigError: the batch or the lanes do not divide over the ranks.
    """
    precision: Precision = "bf16" if stage.precision == "auto" else stage.precision

    def plan_of(zero: int) -> Plan:
        return Plan(run.model, stage, Layout(0, data_ranks), zero, precision)

    counts = stage_parameters(run.model, stage)
    per_sample = tokens(run.model)
    flops = flops_per_sample(run.model, stage)
    at_rest = {part: count.total for part, count in idle(run.model, stage).items()}
    parts = {part: {"total": count, "trained": count, "idle": at_rest.get(part, 0)} for part, count in counts.parts.items()}
    for part, numbers in parts.items():
        numbers["trained"] -= numbers["idle"] if is_trained(part, stage) else numbers["total"]
    return {
        "stage": stage.name,
        "predicted": list(predicted(stage)),
        "parameters": {
            "total": counts.total,
            "trained": trainable(run.model, stage),
            "idle": sum(at_rest.values()),
            "frozen": sum(count for part, count in counts.parts.items() if not is_trained(part, stage)),
            "parts": parts,
            "embeddings": counts.embeddings,
            "joint_blocks": counts.joint,
            "towers": counts.towers,
            "heads": counts.heads,
        },
        "batch": _batch_summary(run, stage, data_ranks),
        "tokens_per_sample": {"total": sum(per_sample.values()), "modalities": per_sample},
        "flops_per_sample": flops,
        "flops_per_step": flops * stage.batch.global_samples,
        "bytes_per_rank": {
            "precision": precision,
            **{f"zero{zero}": fullest(bytes_per_rank(plan_of(zero))) for zero in range(4)},
        },
    }


def _batch_summary(run: Run, stage: Stage, data_ranks: int) -> dict[str, Any]:
    batch, steps = stage.batch, accumulation(stage, data_ranks)
    return {
        "equation": (
            f"global_samples {batch.global_samples} = micro_batch {batch.micro_batch} x data ranks {data_ranks} "
            f"x accumulation {steps}"
        ),
        "global_samples": batch.global_samples,
        "micro_batch": batch.micro_batch,
        "data_ranks": data_ranks,
        "accumulation": steps,
        "lanes": run.data.lanes,
        "lanes_per_rank": lanes_per_rank(run, data_ranks),
        "steps": stage.steps,
        "samples": stage.steps * batch.global_samples,
    }


def layout_summary(plan: Plan) -> dict[str, Any]:
    """What follows from a stage's layout: ranks and layers of every pipeline stage, and what it holds and sends.

    `ranks` are those of each replica, a list of its tensor ranks.
    """
    layout, held, sent = plan.layout, bytes_per_rank(plan), bytes_sent_per_step(plan)
    return {
        "zero": plan.zero,
        "precision": plan.precision,
        "pipeline": layout.pipeline,
        "data": layout.data_ranks,
        "tensor": layout.tensor,
        "pipeline_stages": [
            {
                "layers": [plan.layers[at].name for at in plan.own(index)],
                "ranks": [list(layout.ranks_of(index, replica)) for replica in range(layout.data_ranks)],
                "bytes_held": held[index],
                "bytes_sent_per_step": sent[index],
            }
            for index in range(layout.pipeline)
        ],
        "bytes_per_rank": fullest(held),
        "bytes_sent_per_step": fullest(sent),
        "bubble": bubble(layout.pipeline, plan.micro_batches),
        "imbalance": imbalance(plan),
    }
