"""The layers of one pipeline stage: what they take, run and give. Plain torch; pipeline.py puts them on ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from megadiff.engine.api import PreparedBatch, Score
from megadiff.engine.wire import Wire, dense, pack, tie, unpack
from megadiff.models.mmdit import MMDiT, run_layers
from megadiff.types import LossTerms, Noised, Prediction, Readout, Stream


class Section:
    """The layers [start, stop) of a model's `layers()`. The first section takes batches, the last one scores them.

    Attributes:
        trained_before: whether a layer before these is trained, so that its floats need a gradient.
        prepared: the micro-batches of the step; the sections between the first and the last one read nothing of them.
        terms: the loss terms of the step's micro-batches so far, in the last section.
    """

    def __init__(self, model: MMDiT, start: int, stop: int, *, widths: Mapping[str, int], read: Collection[str]) -> None:
        """Args: widths: of every modality's tokens, in the model's order. read: the losses in training."""
        layers = model.layers()
        self.model, self.widths, self.read = model, dict(widths), tuple(read)
        self.own = layers[start:stop]
        self.first, self.last = start == 0, stop == len(layers)
        self.trained_before = any(parameter.requires_grad for layer in layers[:start] for parameter in layer.parameters())
        self.prepared: Sequence[PreparedBatch] = []
        self.score: Score
        self.terms: list[LossTerms] = []

    def feed(self, prepared: Sequence[PreparedBatch], score: Score) -> None:
        """Take the micro-batches of a step."""
        self.prepared, self.score, self.terms = prepared, score, []

    def train(self, taken: Tensor | tuple[Tensor, ...]) -> Tensor | Wire:
        """One micro-batch forward.

        Args:
            taken: in the first section the micro-batch's number, else what the section before gave.

        Returns:
            The loss in the last section, else what the next one takes. Its gradient reaches the floats taken, as zeros if
            nothing before is trained; without any trained layer so far, the floats given are a leaf that takes a gradient.
        """
        if isinstance(taken, Tensor):
            number, floats = int(taken), None
            stream = self.embed(self.prepared[number].noised)
        else:
            wire = Wire(*taken)
            floats = wire.floats
            stream, number = unpack(wire if self.trained_before else wire._replace(floats=floats.detach()), self.widths)
        stream = self.run(stream, self.read)
        if self.last:
            return self._reaching(self._loss(stream, number), floats)
        given = pack(stream, number)
        return given._replace(floats=self._reaching(given.floats, floats))

    def embed(self, noised: Noised) -> Stream:
        stream: Stream = self.own[0](dense(noised))
        return stream

    def run(self, stream: Stream, read: Collection[str]) -> Stream:
        """The layers that lead to what is read, apart from the model's first and last one."""
        stream = self.model.reading(stream, dict.fromkeys(read))  # of all samples: shapes are constant
        path = [layer for layer in self.model.layers(read)[1:-1] if layer in self.own]
        return run_layers(path, stream, recompute=self.model.activation_checkpointing)

    def heads(self, stream: Stream, readout: Mapping[str, Readout]) -> Prediction:
        prediction: Prediction = self.own[-1](stream, readout)
        return prediction

    def _loss(self, stream: Stream, number: int) -> Tensor:
        micro_batch = self.prepared[number]
        terms = self.score(self.heads(stream, micro_batch.readout), micro_batch)
        self.terms.append(terms)
        return terms.total

    def _reaching(self, given: Tensor, floats: Tensor | None) -> Tensor:
        if floats is not None and not self.trained_before:
            return tie(given, floats)
        return given if given.requires_grad else given.requires_grad_()
