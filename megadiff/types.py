"""The nouns that cross the doors between rooms.

Legend: B samples of a micro-batch, S tokens (positions) of one modality, D width, C channels, H height, W width, R rows.
Everything a model receives or returns is a NamedTuple, dict or tensor, because DeepSpeed's ZeRO-3 hooks look for
tensors inside tuples and dicts only (deepspeed.runtime.zero.utils.apply_to_tensors_only).
"""

from __future__ import annotations

from collections.abc import Mapping
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
        slots: int64 [B]; the sample's place in the global batch, 0 <= slot < global_samples.
        weight: float32 [B]; 1 for a sample that was read, 0 for one that could not be (it keeps its slot).
        ids: B names for logs.
        data_step: which global batch this is part of.
        global_samples: samples of the global batch over all ranks and micro-batches.
        features: by modality precomputed features, float32 [B, S, F], for an alignment loss.
    """

    states: dict[str, Tensor]
    keys: Tensor
    slots: Tensor
    weight: Tensor
    ids: tuple[str, ...]
    data_step: int
    global_samples: int
    features: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        states = {name: state.to(device) for name, state in self.states.items()}
        features = {name: values.to(device) for name, values in self.features.items()}
        moved = {name: getattr(self, name).to(device) for name in ("keys", "slots", "weight")}
        return replace(self, states=states, features=features, **moved)


class Ragged(NamedTuple):
    """How many leading positions of a modality there are in each sample; the others are not computed, nor read out.

    Attributes:
        lengths: int32 [B], at least 1.
        total: their sum; on the host, so that nobody has to wait for a GPU to learn a shape.
        longest: their maximum.
    """

    lengths: Tensor
    total: int
    longest: int


class Noised(NamedTuple):
    """What a denoiser reads.

    Attributes:
        states: per modality the noised state, shaped like Batch.states.
        clocks: per modality float32 [B]; the time input of the network (the process decides: its time t, or its
            marginal standard deviation at t).
        visible: per modality bool [B, S], False where a position must be hidden as an attention key, though it is predicted;
            None for all visible.
        ragged: the modalities of which only leading positions are there; conditions that end before S.
    """

    states: dict[str, Tensor]
    clocks: dict[str, Tensor]
    visible: dict[str, Tensor | None]
    ragged: Mapping[str, Ragged] = {}


class Rows(NamedTuple):
    """Where the packed rows of a modality come from: sample after sample, each one's leading positions.

    Attributes:
        places: int64 [R] into the flattened [B * S] positions.
        samples: int64 [R].
        starts: int32 [B], a sample's first row.
        length: S.
    """

    places: Tensor
    samples: Tensor
    starts: Tensor
    length: int


class Stream(NamedTuple):
    """What flows between the blocks of a model: tokens per modality and one conditioning vector per modality.

    Attributes:
        tokens: per modality [B, S, D], or packed [R, D].
        conditioning: per modality [B, D]; never attended to, never updated.
        visible: per modality bool [B, S] or None (all visible as keys).
        grids: rows and columns of patches of the modalities that are grids.
        ragged: how long the samples of some modalities are.
        rows: where the packed ones lie.
        tapped: [B, S, F], tokens that the alignment layer tapped and projected, on their way to the last layer; None before
            that layer, and where it does not run.
    """

    tokens: dict[str, Tensor]
    conditioning: dict[str, Tensor]
    visible: dict[str, Tensor | None]
    grids: dict[str, tuple[int, int]]
    ragged: Mapping[str, Ragged] = {}
    rows: Mapping[str, Rows] = {}
    tapped: Tensor | None = None

    def dense(self, name: str) -> Tensor:
        """A modality's tokens [B, S, D], zero where there is none."""
        tokens = self.tokens[name]
        if name not in self.rows:
            return tokens
        rows, batch = self.rows[name], len(self.conditioning[name])
        padded = tokens.new_zeros(batch * rows.length, tokens.shape[-1])
        return padded.index_copy(0, rows.places, tokens).view(batch, rows.length, -1)


class Dense(NamedTuple):
    """Readout: the whole output. Grid: [B, C, H, W]. Tokens: logits [B, S, V]: only for small vocabularies and tests."""


class TokenLosses(NamedTuple):
    """Readout: cross entropy per token, as a `CrossEntropy`; logits exist for scored rows only.

    Attributes:
        targets: int64 [B, S], ids below the vocabulary size.
        scored: bool [B, S].
        weights: float32 [B, S], what each position's cross entropy is multiplied by in the training loss.
        number: how many positions are scored; on the host, so that nobody has to wait for a GPU. None: not known.
        mask_class: of a head with a class for the mask state: what that class adds to the released network's loss, softplus of
            the mask's logit, is added to the weighted losses, times the weight.
    """

    targets: Tensor
    scored: Tensor
    weights: Tensor
    number: int | None = None
    mask_class: bool = False


class CrossEntropy(NamedTuple):
    """What TokenLosses gives, float32 [B, S] each, zero where not scored.

    Attributes:
        weighted: the training loss of every position.
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
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: draw among this many likeliest tokens; 0 is all.
        top_p: draw among the likeliest tokens that together have this probability.
        min_p: draw among the tokens that have at least this share of the likeliest one's probability.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class RowKeys(NamedTuple):
    """Which random number belongs to each of R rows: the arguments of `rng.uniform_at`.

    Attributes:
        keys: int64 [R], of each row's sample (and step).
        purpose: a few words.
        places: int64 [R], which of its sample's numbers is a row's.
    """

    keys: Tensor
    purpose: str
    places: Tensor


class SampledRows(NamedTuple):
    """Readout: one token drawn at each of R positions, as `TokenDraws`; logits exist for a chunk of rows at a time.

    A position may be read in K places of the batch (the branches of guidance), whose logits are added up with weights.

    Attributes:
        rows: int64 [K, R], indices into the flattened [B * S] positions.
        weights: float32 [K, R], each column adding up to 1.
        keys: what the rows are drawn with.
        rule: what the draws are made among.
    """

    rows: Tensor
    weights: Tensor
    keys: RowKeys
    rule: DrawRule


class TokenDraws(NamedTuple):
    """What SampledRows gives.

    Attributes:
        ids: int64 [R], the tokens.
        log_probability: float32 [R], of the drawn ids before temperature and truncation.
        entropy: float32 [R] in nats, likewise.
        margin: float32 [R], by how much the likeliest token's probability exceeds the next one's, likewise.
    """

    ids: Tensor
    log_probability: Tensor
    entropy: Tensor
    margin: Tensor


class Aligned(NamedTuple):
    """Readout: 1 - cosine similarity of a block's projected tokens and features, float32 [B], mean over tokens.

    Attributes:
        features: [B, S, F].
    """

    features: Tensor


Readout = Dense | TokenLosses | RowLogits | SampledRows | Aligned

Prediction = dict[str, Any]
"""By modality read out, and `ALIGNMENT`: what the readout describes, a tensor, a CrossEntropy or TokenDraws."""

ALIGNMENT = "alignment"
"""The name of the alignment loss among readouts and predictions, and of its part among parameters."""


class Denoiser(Protocol):
    """A network, or anything that stands in for one (an exact posterior in tests).

    Only the modalities named in `readout` are predicted; towers of the others are not run.
    """

    def __call__(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction: ...


@dataclass(frozen=True)
class LossTerms:
    """The loss of one micro-batch, sums and counts apart (divide once, after the reduction over ranks).

    Attributes:
        total: scalar to back-propagate, already scaled for the engine (data ranks x accumulation / global counts).
        sums: per modality the detached loss sum over the micro-batch, scalar.
        counts: per modality the number of scored elements, scalar.
        sample_sums: per modality float32 [B], detached.
        sample_counts: per modality float32 [B].
        times: per modality float32 [B].
        exact: per modality whose training loss is not its likelihood bound, that bound: (sum, count), scalars.
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
    """A figure about a network, with everything that it depends on: two figures compare where these agree.

    Attributes:
        name: such as "gap/text" or "fid".
        low, high: the ends of its 95 % interval, where it has one.
        depends: hashes of weights and data, sampler, seeds, counts, and so on, as JSON holds them.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    depends: Mapping[str, Any] = field(default_factory=dict)


class Moment(Protocol):
    """What is done between two steps of training (samples, evaluation) sees of it, alike on all ranks."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    def last(self) -> bool:
        """Whether the stage ends here."""

    @property
    def layout(self) -> Layout: ...

    @property
    def device(self) -> torch.device: ...

    def denoiser(self, weights: str | None = None) -> AbstractContextManager[Denoiser]:
        """The network with its plain weights (`raw`), those of an average by its name, or the first average's. Collective."""

    def scalar(self, tag: str, value: float) -> None:
        """Record a number; here and below only the rank that leads writes."""

    def picture(self, tag: str, picture: Image.Image) -> None: ...

    def text(self, tag: str, text: str) -> None: ...

    def metric(self, metric: Metric) -> None: ...
