"""What a step shows of the network's places: norms of gradients, updates and weights, and the largest activations.

Looking costs a pass over the masters and a copy of them at the optimizer's step, when no activation is in memory; so it is for
some steps only. Legend: P places, K tapped streams, M modalities.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from megadiff.config.layout import Layout
from megadiff.distributed.reduce import max_over_ranks, sum_over_ranks
from megadiff.engine.api import Inspection, PreparedBatch
from megadiff.engine.pieces import Piece, Pieces
from megadiff.models.blocks import Block
from megadiff.models.mmdit import MMDiT
from megadiff.models.names import place_of
from megadiff.types import Stream, TokenLosses


def blocks_of(model: MMDiT) -> list[tuple[str, Block]]:
    """The blocks of a model, each as one of its `trunk` or of a `tower`; those of other ranks too."""
    found = [("trunk", block) for block in model.joint]
    found += [("tower", block) for tower in model.towers.values() for block in tower]  # type: ignore[attr-defined]
    return [(place, block) for place, block in found if isinstance(block, Block)]


class Inspector:
    """Looks into one step at a time. It hooks into modules and optimizer only while it looks, in every layout alike: each rank
    counts the pieces that it would save, so that every number counts once.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[str, Block]],
        names: Iterable[str],
        modalities: Sequence[str],
        pieces: Pieces,
        layout: Layout,
        device: torch.device,
    ) -> None:
        """Look at nothing yet.

        Args:
            blocks: see `blocks_of`.
            names: of all parameters, on this rank or not.
            modalities: their names.
        """
        self._pieces, self._layout, self._device, self._modalities = pieces, layout, device, list(modalities)
        self._places = list(dict.fromkeys(place_of(name) for name in names))
        self._blocks = blocks
        self._taps = list(dict.fromkeys(f"{place} {name}" for place, block in blocks for name in block.parts))
        self._forget()

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look at the step in the block."""
        self._forget()
        optimizer = self._pieces.optimizer
        handles = [block.register_forward_hook(partial(self._see, place)) for place, block in self._blocks]
        steps = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        try:
            yield
        finally:
            for handle in (*handles, *steps):
                handle.remove()

    def report(self, prepared: Sequence[PreparedBatch], grad_norm: float) -> Inspection:
        """What was seen. Collective.

        Args:
            prepared: this rank's micro-batches of the step.
            grad_norm: over all parameters before clipping; the gradients of places are shares of it.
        """
        positions = self._positions(prepared)
        sums = sum_over_ranks(torch.cat([self._squares.flatten(), positions.flatten()])).cpu()
        squares, counts = torch.split(sums, [self._squares.numel(), positions.numel()])
        gradients, updates, weights = squares.view(3, -1).sqrt()
        gradients *= grad_norm / gradients.square().sum().sqrt()
        trained = [index for index, weight in enumerate(weights.tolist()) if weight > 0]
        peaks = zip(self._taps, max_over_ranks(self._peaks).tolist(), strict=True)
        rates = dict(zip(self._modalities, counts.view(-1, 3).tolist(), strict=True))
        norms = [{self._places[index]: norm[index].item() for index in trained} for norm in (gradients, updates, weights)]
        return Inspection(
            gradients=norms[0],
            updates=norms[1],
            weights=norms[2],
            activations={tap: peak for tap, peak in peaks if peak >= 0},
            scored={name: scored / all_of for name, (scored, _, all_of) in rates.items() if all_of},
            computed={name: computed / all_of for name, (_, computed, all_of) in rates.items() if all_of},
        )

    def _forget(self) -> None:
        self._squares = torch.zeros(3, len(self._places), dtype=torch.float64, device=self._device)
        self._peaks = torch.full((len(self._taps),), -math.inf, device=self._device)
        self._stepped: list[tuple[Piece, Tensor]] = []

    def _before(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """DeepSpeed steps some of its flat tensors at a time, and only these have their gradients now."""
        flats = {id(flat) for group in optimizer.param_groups for flat in group["params"]}
        own = [piece for piece in self._pieces.trained if piece.owned and id(piece.flat) in flats]
        gradients = [(piece, piece.gradient) for piece in own]
        self._stepped = [(piece, piece.master.clone()) for piece, gradient in gradients if gradient is not None]
        self._add(0, own, [gradient for _, gradient in gradients if gradient is not None])

    def _after(self, *_: object) -> None:
        pieces = [piece for piece, _ in self._stepped]
        masters, changes = [piece.master for piece in pieces], [before for _, before in self._stepped]
        if pieces:
            torch._foreach_sub_(changes, masters)
        self._add(1, pieces, changes)
        self._add(2, pieces, masters)
        self._stepped = []

    def _add(self, row: int, pieces: Sequence[Piece], tensors: Sequence[Tensor]) -> None:
        if tensors:
            squares = torch.stack(torch._foreach_norm(list(tensors))).double().square().to(self._device)
            places = torch.tensor([self._places.index(place_of(piece.name)) for piece in pieces], device=self._device)
            self._squares[row].index_add_(0, places, squares)

    def _see(self, place: str, block: nn.Module, _: object, stream: Stream) -> None:
        assert isinstance(block, Block)
        for name in block.parts:
            tap = self._taps.index(f"{place} {name}")
            peak = torch.linalg.vector_norm(stream.tokens[name].detach(), math.inf, dtype=torch.float32)
            self._peaks[tap] = torch.maximum(self._peaks[tap], peak)

    def _positions(self, prepared: Sequence[PreparedBatch]) -> Tensor:
        """Scored, computed and all positions of categorical modalities, float64 [M, 3]; zeros on ranks that do not speak."""
        table = torch.zeros(len(self._modalities), 3, dtype=torch.float64, device=self._device)
        for micro_batch in prepared if self._layout.speaks else ():
            for row, name in enumerate(self._modalities):
                state, readout = micro_batch.noised.states[name], micro_batch.readout.get(name)
                if state.is_floating_point():
                    continue
                table[row, 0] += readout.scored.sum() if isinstance(readout, TokenLosses) else 0
                ragged = micro_batch.noised.ragged.get(name)
                table[row, 1] += state.numel() if ragged is None else ragged.total
                table[row, 2] += state.numel()
        return table
