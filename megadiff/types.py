"""The nouns that cross the doors between rooms.

Legend: B samples of a micro-batch, S tokens (positions) of one modality, D width, C channels, H height, W width, R rows.
Everything a model receives or returns is a NamedTuple, dict or tensor, because DeepSpeed's ZeRO-3 hooks look for
tensors inside tuples and dicts only (deepspeed.runtime.zero.utils.apply_to_tensors_only).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from megadiff.config.layout import Layout


@dataclass(frozen=True)
class Batch:
    """One micro-batch of clean samples.

    Attributes:
        states: per modality the clean state: float [B, C, H, W] for a grid, int64 [B, S] for tokens.
        keys: int64 [B]; one random key per sample, a function of (run seed, epoch, sample index, data step).
        slots: int64 [B]; the sample's index in the global batch, 0 <= slot < global_samples.
        weight: float32 [B]; 0 for a sample that could not be read (it keeps its slot), else 1.
        ids: B names for logs.
        data_step: the index of the global batch that this is part of.
        global_samples: samples of the global batch over all ranks and micro-batches.
        features: by modality, precomputed features for an alignment loss, float32 [B, S, F].
        sources: B names of the samples' sources; empty where there is one only.
        host: of a batch on a GPU, the part with token states alone, on the CPU; so no count or length of tokens waits for the
            device.
    """

    states: dict[str, Tensor]
    keys: Tensor
    slots: Tensor
    weight: Tensor
    ids: tuple[str, ...]
    data_step: int
    global_samples: int
    features: dict[str, Tensor] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    host: Batch | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        states = {name: state.to(device) for name, state in self.states.items()}
        features = {name: values.to(device) for name, values in self.features.items()}
        vectors = {name: getattr(self, name).to(device) for name in ("keys", "slots", "weight")}
        tokens = {name: state for name, state in self.states.items() if state.dtype == torch.int64}
        host = replace(self, states=tokens, features={}) if self.keys.device.type == "cpu" != device.type else self.host
        return replace(self, states=states, features=features, host=host, **vectors)


class Ragged(NamedTuple):
    """The number of leading positions of a modality in each sample; the others are neither computed nor read out.

    Attributes:
        lengths: int32 [B], at least 1.
        total: their sum; on the host, so that no shape waits for a GPU.
        longest: their maximum.
    """

    lengths: Tensor
    total: int
    longest: int


class Noised(NamedTuple):
    """The input of a denoiser.

    Attributes:
        states: per modality the noised state, shaped like Batch.states.
        clocks: per modality float32 [B], the network's time input: the time t or, as the process decides, the marginal
            standard deviation at t.
        visible: per modality bool [B, S], False for positions that are hidden as attention keys, though predicted; None if
            all are visible.
        ragged: the modalities with leading positions only: conditions that end before S.
    """

    states: dict[str, Tensor]
    clocks: dict[str, Tensor]
    visible: dict[str, Tensor | None]
    ragged: Mapping[str, Ragged] = {}


class Rows(NamedTuple):
    """The origin of a modality's packed rows: the leading positions of each sample, sample after sample.

    Attributes:
        places: int64 [R], indices into the flattened [B * S] positions.
        samples: int64 [R], the sample of each row.
        starts: int32 [B], each sample's first row.
        length: S.
    """

    places: Tensor
    samples: Tensor
    starts: Tensor
    length: int


class Stream(NamedTuple):
    """The state between the blocks of a model: tokens per modality and one conditioning vector per modality.

    Attributes:
        tokens: per modality [B, S, D], or packed [R, D].
        conditioning: per modality [B, D]; never attended to, never updated.
        visible: per modality bool [B, S] or None (all visible as keys).
        grids: for modalities that are grids, their rows and columns of patches.
        ragged: for some modalities, the lengths of their samples.
        rows: for packed modalities, the origin of their rows.
        tapped: [B, S, F], tokens that the alignment layer projected for the last layer; None before that layer and without it.
        read: the modalities whose tokens lead somewhere from the last joint block, which leaves others unchanged; and the
            samples in which they do, int64 [b], which alone it keeps (None: all). None: all modalities, in all samples.
    """

    tokens: dict[str, Tensor]
    conditioning: dict[str, Tensor]
    visible: dict[str, Tensor | None]
    grids: dict[str, tuple[int, int]]
    ragged: Mapping[str, Ragged] = {}
    rows: Mapping[str, Rows] = {}
    tapped: Tensor | None = None
    read: Mapping[str, Tensor | None] | None = None

    def kept(self, name: str) -> Tensor | None:
        """int64 [b], the samples that a modality's tokens are left of; None: all."""
        samples = None if self.read is None else self.read.get(name)
        return None if samples is None or len(self.tokens[name]) == len(self.conditioning[name]) else samples

    def dense(self, name: str) -> Tensor:
        """A modality's tokens [B, S, D], zero where there is none."""
        tokens, batch = self.tokens[name], len(self.conditioning[name])
        if name not in self.rows:
            samples = self.kept(name)
            return tokens if samples is None else tokens.new_zeros(batch, *tokens.shape[1:]).index_copy(0, samples, tokens)
        rows = self.rows[name]
        padded = tokens.new_zeros(batch * rows.length, tokens.shape[-1])
        return padded.index_copy(0, rows.places, tokens).view(batch, rows.length, -1)


class Dense(NamedTuple):
    """Readout: the whole output. Grids: [B, C, H, W]. Tokens: logits [B, S, V], for small vocabularies and tests only.

    Attributes:
        samples: int64 [b], the samples that are read, ascending: the output of the others is open. None: all.
    """

    samples: Tensor | None = None


class TokenLosses(NamedTuple):
    """Readout: cross entropy per token, as a `CrossEntropy`; logits exist for scored rows only.

    Attributes:
        targets: int64 [B, S], ids below the vocabulary size.
        scored: bool [B, S].
        weights: float32 [B, S], the factor on each position's cross entropy in the training loss.
        number: the number of scored positions; on the host, so that nothing waits for a GPU. None: not known.
        mask_class: for a head with a class for the mask state: add the class's part of the released network's loss, the weight
            times the softplus of the mask's logit, to the weighted losses.
    """

    targets: Tensor
    scored: Tensor
    weights: Tensor
    number: int | None = None
    mask_class: bool = False


class CrossEntropy(NamedTuple):
    """The answer to TokenLosses, float32 [B, S] each, zero at positions that are not scored.

    Attributes:
        weighted: the training loss of each position.
        unweighted: the cross entropy alone, without a gradient.
    """

    weighted: Tensor
    unweighted: Tensor


class RowLogits(NamedTuple):
    """Readout: float32 logits [R, V] of chosen positions.

    Attributes:
        rows: int64 [R], indices into the flattened [B * S] positions.
    """

    rows: Tensor


class DrawRule(NamedTuple):
    """How a token is drawn from logits.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: number of likeliest tokens to draw among; 0 is all.
        top_p: total probability of the likeliest tokens to draw among.
        min_p: smallest probability of a token to draw, as a share of the likeliest one's.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class RowKeys(NamedTuple):
    """The random numbers of each of R rows: those of the key `rng.fold(keys, places)`.

    Attributes:
        keys: int64 [R], the key of each row's sample (and step).
        purpose: a few words.
        places: int64 [R], the position of each row in its sample.
    """

    keys: Tensor
    purpose: str
    places: Tensor


class SampledRows(NamedTuple):
    """Readout: one token drawn at each of R positions, as `TokenDraws`; logits exist for a chunk of rows at a time.

    A position may be read in K branches of guidance in the batch; the logits are their weighted sum.

    Attributes:
        rows: int64 [K, R], indices into the flattened [B * S] positions.
        weights: float32 [K, R], each column adding up to 1.
        keys: the random numbers of the draws.
        rule: how tokens are drawn from logits.
        samples: int64 [b], the samples that have these positions, ascending. None: all.
    """

    rows: Tensor
    weights: Tensor
    keys: RowKeys
    rule: DrawRule
    samples: Tensor | None = None


class TokenDraws(NamedTuple):
    """The answer to SampledRows.

    Attributes:
        ids: int64 [R], the tokens.
        log_probability: float32 [R], of these tokens before temperature and truncation.
        entropy: float32 [R] in nats, before both.
        margin: float32 [R], the likeliest token's probability minus the next one's, before both.
    """

    ids: Tensor
    log_probability: Tensor
    entropy: Tensor
    margin: Tensor


class Aligned(NamedTuple):
    """Readout: 1 - cosine similarity of a block's projected tokens and features, mean over tokens, float32 [B].

    Attributes:
        features: [B, S, F].
    """

    features: Tensor


Readout = Dense | TokenLosses | RowLogits | SampledRows | Aligned

Prediction = dict[str, Any]
"""By modality read out, and `ALIGNMENT`: what the readout describes, a tensor, a CrossEntropy or TokenDraws."""

ALIGNMENT = "alignment"
"""The alignment loss's name in readouts and predictions, and its part's name in parameters."""


class Denoiser(Protocol):
    """A network, or anything that stands in for one (an exact posterior in tests).

    It predicts the modalities named in `readout` only, and runs no towers of others.
    """

    def __call__(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction: ...


@dataclass(frozen=True)
class LossTerms:
    """The loss of one micro-batch, as sums and counts (divided once, after the reduction over ranks).

    Attributes:
        total: the scalar to back-propagate, scaled for the engine (data ranks x accumulation / global counts).
        sums: per modality the detached loss sum over the micro-batch, scalar.
        counts: per modality the number of scored elements, scalar.
        sample_sums: per modality float32 [B], detached.
        sample_counts: per modality float32 [B].
        times: per modality float32 [B].
        exact: for modalities with a likelihood bound, its (sum, count), scalars.
    """

    total: Tensor
    sums: dict[str, Tensor]
    counts: dict[str, Tensor]
    sample_sums: dict[str, Tensor]
    sample_counts: dict[str, Tensor]
    times: dict[str, Tensor]
    exact: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A figure about a network, with everything that it depends on. Two figures compare if these agree.

    Attributes:
        name: such as "gap/text" or "fid".
        low, high: the ends of its 95 % interval; None without one.
        depends: hashes of weights and data, sampler, seeds, counts, and so on, as JSON holds them.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    depends: Mapping[str, Any] = field(default_factory=dict)


class Moment(Protocol):
    """What callbacks between two training steps (samples, evaluation) see of the training, equal on all ranks."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    def last(self) -> bool:
        """Whether this is the stage's last step."""

    @property
    def layout(self) -> Layout: ...

    @property
    def device(self) -> torch.device: ...

    def denoiser(self, weights: str | None = None) -> AbstractContextManager[Denoiser]:
        """The network with plain weights (`raw`), an average's by its name, or by default the first average's. Collective."""

    def scalar(self, tag: str, value: float) -> None:
        """Record a number. Here and below only the leading rank writes."""

    def picture(self, tag: str, picture: Image.Image) -> None: ...

    def text(self, tag: str, text: str) -> None: ...

    def metrics(self, metrics: Sequence[Metric]) -> None:
        """Record figures, equal on all ranks; one of them may decide which checkpoint is the best."""

    def failed(self, sentence: str) -> None:
        """Record that something could not be measured, on all ranks alike; training goes on."""
