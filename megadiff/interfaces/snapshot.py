"""A training snapshot of the released code: two sets of weights, AdamW's moments, and the training's progress.

It is a dict: `model` and `ema` are state dicts, `optimizer` and `scheduler` the states of torch's AdamW and of the warm-up.
The optimizer names a parameter by its index among the trained ones, in the order of `model` without the fixed positions and
without a tensor's second name. The frozen ones are not recorded; they follow from the shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor

from megadiff.config.errors import UserError
from megadiff.config.schema import Optimizer
from megadiff.weights import official
from megadiff.weights.checkpoint import MOMENTS
from megadiff.weights.official_config import IMAGE, TEXT

JOINT = "joint"
WARMUP_STEPS = 2500
"""The released code's default; the scheduler's state may hold another."""
_EMBEDDINGS = {
    TEXT: ("text_embedder.", "text_pos_embed.", "text_time_encoder."),
    IMAGE: ("image_embedder.", "image_time_encoder."),
}
_FROZEN_BY = {
    JOINT: (*_EMBEDDINGS[TEXT], *_EMBEDDINGS[IMAGE], "joint_embedding."),
    IMAGE: (*_EMBEDDINGS[IMAGE], "image_dit.", "image_final_layer."),
    TEXT: (*_EMBEDDINGS[TEXT], "text_dit.", "text_final_layer."),
}
"""Parameters frozen by the released flags --freeze_joint, --freeze_image and --freeze_text, by prefix."""


@dataclass(frozen=True)
class TrainingState:
    """The state that training continues from.

    Attributes:
        weights: the plain weights, by released name.
        moments: by kind (MOMENTS) and released name; zeros for parameters that have had no gradient.
        freeze: the frozen parts, by our names.
        adam_steps: number of steps in the moments.
        optimizer_step: steps of the whole training, over all resumptions.
        optimizer: the optimizer's settings.
    """

    weights: Mapping[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    freeze: tuple[str, ...]
    adam_steps: int
    optimizer_step: int
    optimizer: Optimizer


def training_state(snapshot: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TrainingState | None:
    """The training's state in a snapshot; None without AdamW's moments.

    Args:
        tensors: the plain weights by their released names, in the snapshot's order.

    Raises:
        UserError: the state is not that of the released code's optimizer, or does not fit the weights.
    """
    stored = snapshot.get("optimizer")
    if not isinstance(stored, Mapping) or not stored.get("state"):
        return None
    try:
        (group,), states = stored["param_groups"], stored["state"]
        scheduler = snapshot.get("scheduler") or {}
        adam_steps = max(int(state["step"]) for state in states.values())
        shapes = {place: tuple(state["exp_avg"].shape) for place, state in states.items()}
        flags, names = _trained(tensors, len(group["params"]), shapes)
        moments = {
            kind: {
                name: states[place][kind].float() if place in states else torch.zeros(tensors[name].shape)
                for place, name in enumerate(names)
            }
            for kind in MOMENTS
        }
        return TrainingState(
            weights=tensors,
            moments=moments,
            freeze=_parts(flags),
            adam_steps=adam_steps,
            optimizer_step=int(scheduler.get("last_epoch", adam_steps)),
            optimizer=Optimizer(
                learning_rate=group.get("initial_lr", group["lr"]),
                betas=tuple(group["betas"]),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                decay_all=True,
                warmup_steps=scheduler.get("warmup_steps", WARMUP_STEPS),
                gradient_clip=1.0,
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unfit(f"its optimizer's state is not that of the released code ({type(error).__name__}: {error})") from None


def _trained(
    tensors: Mapping[str, Tensor], count: int, shapes: Mapping[int, tuple[int, ...]]
) -> tuple[tuple[str, ...], list[str]]:
    """The flags with which `count` parameters are trained, with moments of these shapes; and their names."""
    fitting: dict[tuple[str, ...], tuple[str, ...]] = {}
    for flags in chain.from_iterable(combinations(_FROZEN_BY, size) for size in range(len(_FROZEN_BY) + 1)):
        names = tuple(_names(tensors, flags))
        if len(names) == count and all(
            place < count and tuple(tensors[names[place]].shape) == shape for place, shape in shapes.items()
        ):
            fitting.setdefault(names, flags)
    if len(fitting) != 1:
        raise _unfit(f"its optimizer has {count} parameters, which are not those of its network, whatever was frozen")
    ((names, flags),) = fitting.items()
    return flags, list(names)


def _names(tensors: Mapping[str, Tensor], flags: Collection[str]) -> Iterator[str]:
    """The names of trained parameters, in the network's order."""
    frozen = tuple(prefix for flag in flags for prefix in _FROZEN_BY[flag]) + official.unread_prefixes(tensors)
    yield from (name for name in official.parameter_names(tensors) if not name.startswith(frozen))


def _parts(flags: Collection[str]) -> tuple[str, ...]:
    """Our frozen parts. Raises UserError for embeddings frozen without the joint blocks: here both are one part."""
    if flags and JOINT not in flags:
        raise _unfit(
            f"it was trained with --freeze_{' and --freeze_'.join(flags)} but without --freeze_joint, which is no part here"
        )
    return tuple(flags)


def _unfit(reason: str) -> UserError:
    return UserError(f"the snapshot's training cannot be resumed: {reason}; take its weights alone by --use ema or --use raw")
