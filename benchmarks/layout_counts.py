"""One rank of `layouts.py`: trains a few steps in a layout, and counts what it holds and sends.

Bytes held are those of distinct storages; bytes sent those of the tensors handed to each collective of torch.distributed with
two ranks or more: of an all-gather the gathered tensor, of a reduce-scatter the scattered one.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadiff import rng
from megadiff.config.layout import Layout
from megadiff.config.load import load_run
from megadiff.config.schema import GridSpace, Model, Run
from megadiff.diffusion.objective import DiffusionObjective, NoisedBatch
from megadiff.distributed.ranks import Ranks
from megadiff.engine.build import build_engine
from megadiff.types import Batch, TokenLosses

SEED = 3
COLLECTIVES = {
    "all_reduce": "all_reduce",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "send": "send",
    "isend": "send",
    "all_gather_into_tensor": "all_gather",
    "_all_gather_base": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
}
"""Functions of torch.distributed and the collective that each is; the others are called with objects or lists."""


class Sent:
    """Bytes handed to collectives since the last `take`."""

    def __init__(self) -> None:
        """Wrap the functions, before anything has taken them from the module."""
        self.counts: Counter[str] = Counter()
        self._inside = False
        for name, kind in COLLECTIVES.items():
            setattr(dist, name, self._counting(getattr(dist, name), kind))

    def take(self) -> dict[str, int]:
        counts, self.counts = dict(self.counts), Counter()
        return counts

    def _counting(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            outermost, self._inside = not self._inside, True  # old names call new ones
            tensors = [value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor)]
            if outermost and dist.get_world_size(keywords.get("group")) > 1:
                self.counts[kind] += max(tensor.numel() * tensor.element_size() for tensor in tensors)
            try:
                return function(*arguments, **keywords)
            finally:
                self._inside = not outermost

        return counted


class Saved:
    """Bytes of distinct storages that autograd keeps for the backward pass, but for parameters."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.peak = 0
        self._parameters = list(module.parameters())
        self._kept: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor):
            yield

    def _pack(self, tensor: Tensor) -> Any:
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in storages(parameter.data for parameter in self._parameters):  # ZeRO-3 gathers them anew
            self._kept[address] += 1
            self._sizes[address] = storage.nbytes()
            weakref.finalize(kept, self._drop, address)
            self.peak = max(self.peak, sum(self._sizes.values()))
        return kept

    def _drop(self, address: int) -> None:
        self._kept[address] -= 1
        if not self._kept[address]:
            del self._sizes[address]


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class WholeObjective(DiffusionObjective):
    """The training's objective, but every token is scored and none is hidden, so that each micro-batch costs the most."""

    def prepare(self, batch: Batch) -> NoisedBatch:
        prepared = super().prepare(batch)
        readout = dict(prepared.readout)
        for name, asked in readout.items():
            if isinstance(asked, TokenLosses):
                readout[name] = asked._replace(scored=torch.ones_like(asked.scored), number=asked.scored.numel())
        noised = prepared.noised._replace(visible=dict.fromkeys(prepared.noised.states), ragged={})
        return replace(prepared, readout=readout, noised=noised)


def batches_of(model: Model, step: int, layout: Layout, samples: int, micro_batch: int) -> list[Batch]:
    """This replica's micro-batches of a step, drawn alike on all ranks."""
    generator, states = torch.Generator().manual_seed(step), {}
    for name, modality in model.modalities.items():
        space = modality.space
        if isinstance(space, GridSpace):
            states[name] = torch.randn(samples, space.channels, space.height, space.width, generator=generator)
        else:  # the first ids may stand for an end and for padding
            states[name] = torch.randint(2, space.vocabulary, (samples, space.length), generator=generator)
    slots = torch.arange(samples)
    own = slots.chunk(layout.data_ranks)[layout.data_rank]
    return [
        Batch(
            states={name: state[rows] for name, state in states.items()},
            keys=rng.sample_keys(SEED, step, rows),
            slots=rows,
            weight=torch.ones(len(rows)),
            ids=tuple(map(str, rows.tolist())),
            data_step=step,
            global_samples=samples,
        )
        for rows in own.split(micro_batch)
    ]


def storages(tensors: Iterable[Tensor | None], but: Mapping[int, int] | None = None) -> dict[int, int]:
    """By address, the sizes in bytes of the storages of some tensors, but for some addresses."""
    found = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return {one.data_ptr(): one.nbytes() for one in found if one.nbytes() and one.data_ptr() not in (but or {})}


class Held:
    """What an engine's rank holds, by kind. DeepSpeed's places of gradients and masters are those of 0.19.8."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.module = engine, engine.backend.module
        self.deepspeed, self.optimizer = engine.backend.engine, engine.pieces.optimizer
        self.wrapper = self.deepspeed.optimizer
        self.gradients = self.buffers = self.gathered = 0
        self._hooks = [self.optimizer.register_step_pre_hook(lambda *_: self.look())]
        backward = self._backward = self.deepspeed.backward

        def backward_and_look(*arguments: Any, **keywords: Any) -> Any:
            result = backward(*arguments, **keywords)
            self.look()
            return result

        self.deepspeed.backward = backward_and_look
        flatten = self._flatten = getattr(self.wrapper, "get_flat_partition", None)

        def flatten_and_look(*arguments: Any, **keywords: Any) -> Any:
            result = flatten(*arguments, **keywords)
            self.look(result)
            return result

        if flatten is not None:
            self.wrapper.get_flat_partition = flatten_and_look
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_hook(lambda _: self._look_around(backward=True)))
        for child in self.module.modules():
            self._hooks.append(child.register_forward_hook(lambda *_: self._look_around()))

    def rest(self) -> None:
        """Take the hooks away: they cost time."""
        for hook in self._hooks:
            hook.remove()
        self.deepspeed.backward = self._backward
        if self._flatten is not None:
            self.wrapper.get_flat_partition = self._flatten

    def look(self, flattened: Sequence[Tensor] = ()) -> None:
        """Count gradients now, among them those just flattened; the largest number stays."""
        buffers = self._bucket_storages()
        parameters = [*self.module.parameters(), *(p for group in self.optimizer.param_groups for p in group["params"])]
        averaged = getattr(self.wrapper, "averaged_gradients", {})
        partitions = [*flattened, *(tensor for group in averaged.values() for tensor in group or [])]
        partitions += [getattr(self.wrapper, "grad_partitions_flat_buffer", None)]
        partitions += [getattr(parameter, "grad_accum", None) for parameter in parameters]
        gradients = storages([*(parameter.grad for parameter in parameters), *partitions], but=buffers)
        self.gradients = max(self.gradients, sum(gradients.values()))

    def _look_around(self, *, backward: bool = False) -> None:
        """Count buffers and gathered weights within a forward or backward pass, and in the latter gradients."""
        if backward:
            self.look()
        self.buffers = max(self.buffers, sum(self._bucket_storages().values()))
        whole = storages(parameter.data for parameter in self.module.parameters() if hasattr(parameter, "ds_tensor"))
        self.gathered = max(self.gathered, sum(whole.values()))

    def _bucket_storages(self) -> dict[int, int]:
        buckets = getattr(self.wrapper, "ipg_buckets", {}).values()
        return storages(buffer for bucket in buckets for buffer in _listed(bucket.buffer))

    def between_steps(self) -> dict[str, int]:
        parameters = list(self.module.parameters())
        weights = storages([*(p.data for p in parameters), *(getattr(p, "ds_tensor", None) for p in parameters)])
        masters = [p for group in self.optimizer.param_groups for p in group["params"]]
        frozen = [piece.master for piece in self.engine.pieces.frozen]
        moments = [value for state in self.optimizer.state.values() for name, value in state.items() if name != "step"]
        averages = [average for averages in self.engine.ema.averages.values() for average in averages]
        kinds = {"weights": weights, "master": storages([*masters, *frozen], but=weights)}
        kinds |= {"adam": storages(moments), "ema": storages(averages)}
        return {kind: sum(sizes.values()) for kind, sizes in kinds.items()}


def _listed(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def main(request: dict[str, Any]) -> None:
    """Print one JSON line: by stage of the run, bytes held and sent, and the seconds of a step."""
    run, ranks = load_run(request["run"], request["overrides"]), Ranks.from_environment()
    sent = Sent()
    print(
        json.dumps({stage: counted(run, stage, request["tree"], ranks, sent, request["steps"]) for stage in request["stages"]})
    )


def counted(run: Run, name: str, tree: dict[str, Any], ranks: Ranks, sent: Sent, steps: int) -> dict[str, Any]:
    """Train a stage from fresh weights. The second step is counted; the ones after it are timed, if there are any."""
    stage = run.stage(name)
    engine = build_engine(run.model, stage, tree, seed=SEED, ranks=ranks)
    layout, batch = engine.layout, stage.batch
    objective = WholeObjective(run.model, stage, SEED)
    held, saved, seconds, bytes_sent = Held(engine), Saved(engine.backend.module), [], {}  # type: ignore[attr-defined]
    for step in range(steps):
        batches = batches_of(run.model, step, layout, batch.global_samples, batch.micro_batch) if layout.reads else []
        dist.barrier()
        sent.take()
        began = time.perf_counter()
        with saved.watching() if step == 1 else nullcontext():
            engine.step(batches, objective)
        seconds.append(time.perf_counter() - began)
        if step == 1:
            bytes_sent = sent.take()
            held.rest()
    kinds = {**held.between_steps(), "gathered": held.gathered, "gradients": held.gradients}
    kinds |= {"activations": saved.peak, "buffers": held.buffers}
    return {"held": kinds, "sent": bytes_sent, "step_s": statistics.median(seconds[2:] or seconds)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
