"""Blocks through torch.compile: one graph for each set of modalities, and each shape of their tokens.

What a block computes is compiled, and not its call, so that hooks stay outside the graph: ZeRO-3 gathers a block's weights
before it, and releases them after it. Blocks of the same modalities share their graphs.
Importing this takes seconds, for it imports the compiler.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config, lookup_backend, maybe_mark_dynamic
from torch._dynamo.exc import BackendCompilerFailed

from megadiff.config.errors import UserError
from megadiff.models.attention import Projection
from megadiff.models.blocks import Block, Given
from megadiff.models.mmdit import MMDiT

MOST_GRAPHS = 32
"""Of one network; shapes beyond them run uncompiled."""
INDUCTOR = "inductor"
log = logging.getLogger(__name__)


def compile_for_training(model: MMDiT, backend: str = INDUCTOR) -> None:
    """Let the blocks run compiled in training mode; in evaluation mode, where shapes vary more, they run uncompiled.

    The number of packed rows is a dynamic size, so that texts of any lengths share a graph.

    Args:
        backend: of torch.compile.
    """
    _compile(model, Graphs(backend), training_only=True)


def compile_for_sampling(model: MMDiT, backend: str = INDUCTOR) -> None:
    """Let the blocks run compiled; on a GPU, recorded as CUDA graphs.

    Tokens are not packed into rows: with constant shapes every step of a batch runs the same graphs.
    """
    model.embed.packs = False
    recorded = model.device.type == "cuda"
    if recorded:
        # A graph's outputs hold until the next step begins. Solvers keep those of the heads, which are not compiled.
        model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())  # type: ignore[no-untyped-call]
    _compile(model, Graphs(backend, {"triton.cudagraphs": True} if recorded else None), training_only=False)


class Graphs:
    """Makes the graphs of a network's blocks, and counts them: a backend of torch.compile.

    Attributes:
        made: how many.
    """

    def __init__(self, backend: str, options: dict[str, Any] | None = None) -> None:
        # Else 8, of all blocks together.
        config.recompile_limit = max(config.recompile_limit, MOST_GRAPHS)
        self.make: Callable[..., Callable[..., Any]] = lookup_backend(backend)
        self.options = {} if options is None else {"config_patches": options}
        self.made = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        began = time.monotonic()
        made = self.make(graph, inputs, **self.options)
        self.made += 1
        tensors = [given for given in inputs if isinstance(given, Tensor) and not isinstance(given, nn.Parameter)]
        shapes = " ".join(str(list(tensor.shape)) for tensor in tensors)
        log.info("compile: graph %d, of a block that takes %s (%.1f s)", self.made, shapes, time.monotonic() - began)
        if self.made == MOST_GRAPHS:
            log.warning("compile: no more than %d graphs are made; other shapes run uncompiled", MOST_GRAPHS)
        return made


class CompiledCompute:
    """A block's `compute`, compiled."""

    def __init__(self, block: Block, graphs: Graphs, *, training_only: bool) -> None:
        self.block, self.graphs, self.training_only = block, graphs, training_only
        self.plain = block.compute
        self.compiled = torch.compile(self.plain, backend=graphs, dynamic=False, fullgraph=True)

    def __call__(self, given: Mapping[str, Given], read: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        if self.training_only and not self.block.training:
            return self.plain(given, read)
        bounded = {name: self._bounded(name, own) for name, own in given.items()}
        try:
            if self.graphs.made < MOST_GRAPHS:
                return self.compiled(bounded, read)
            with torch.compiler.set_stance("eager_on_recompile"):
                return self.compiled(bounded, read)
        except BackendCompilerFailed as error:
            why = str(error.inner_exception).strip().partition("\n")[0]
            raise UserError(f"compile: blocks cannot be compiled here ({why}); leave compile out") from error

    def _bounded(self, name: str, given: Given) -> Given:
        """The same with a bound in place of the longest sample's rows, and the number of rows marked as a dynamic size."""
        tokens, _, placing = given
        projection: Projection = self.block.parts[name].projection  # type: ignore[assignment]
        projection.table(tokens.device, placing.grid)  # a graph would compute it at every call
        if placing.samples is None:
            return given
        for rows in (tokens, placing.samples):
            maybe_mark_dynamic(rows, 0)
        return given._replace(placing=placing._replace(span=placing.span._replace(longest=projection.length)))


def _compile(model: MMDiT, graphs: Graphs, *, training_only: bool) -> None:
    # Dynamo looks at the gradient of everything that a graph takes.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
    for block in model.modules():
        if isinstance(block, Block):
            block.compute = CompiledCompute(block, graphs, training_only=training_only)  # type: ignore[method-assign]
