"""Sampling: how samples are drawn, and what is drawn during a run and at its end."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from megadiff.config.schema.base import NotNegative, Periodic, Positive, Section, Share, Weight

MOST_STEPS = 1_000_000
"""Bound on the steps of sampling: their times must fit into memory."""


class Sampling(Section):
    """How samples are drawn. The flags of `megadiff sample` are made from these fields, and their help from the texts below."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    steps: Positive = 50
    """Sampling steps."""
    grid: Literal["auto", "uniform", "square", "karras", "shifted", "paper"] = "auto"
    """Where the steps lie between t = 1 and 0. uniform: evenly; square: evenly in sqrt(t); karras: evenly in (sigma /
    alpha)^(1/7); shifted: pushed towards 1 by grid_shift; paper: evenly from 1 to 1e-5, and then to 0; auto: square where a vp
    modality is generated, else uniform."""
    grid_shift: Annotated[float, Field(gt=0)] = 3.0
    """s of the shifted grid: t = s u / (1 + (s - 1) u)."""
    solver: Literal["euler", "heun", "heun_time", "dpmpp_2m", "sde_euler", "sde_dpmpp_2m"] = "heun"
    """The solver of Gaussian modalities (pictures, numbers). heun steps along sigma / (alpha + sigma); heun_time along t itself
    (the paper), for grids that come close to 0."""
    order: Literal["ancestral", "tau_leaping", "first_hitting", "confidence", "entropy", "margin", "threshold"] = "ancestral"
    """When categorical positions (tokens, classes) become visible. ancestral: by the exact reverse process; tau_leaping: by
    rates held fixed over a step (the paper); first_hitting: one at a time at exact times, whatever the number of steps
    (ancestral beside a Gaussian modality); confidence, entropy, margin (of the likeliest to the next): the surest first;
    threshold: all surer than the threshold."""
    order_noise: Annotated[float, Field(ge=0)] = 0.0
    """The Gumbel noise on the score of the confidence, entropy and margin orders, times t."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.9
    """The probability above which the threshold order makes a position visible."""
    remask: Literal["none", "cap", "conf", "loop"] = "none"
    """ReMDM (arXiv 2503.00307), with the ancestral order: visible positions are masked again with a capped probability; the
    less sure ones more often; or while the clock stands still in the middle of the run."""
    remask_strength: Share = 0.05
    """The cap on the probability of masking a position again in a step."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Temperature of token draws; 0 takes the likeliest."""
    top_k: NotNegative = 0
    """Draw among this many likeliest tokens; 0 is all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    min_p: Share = 0.0
    """Draw among the tokens that have at least this share of the likeliest one's probability."""
    resample: Positive = 1
    """Repeats of each step, with its noise put back between, where part of a modality is known (RePaint, arXiv 2201.09865)."""
    guidance: Weight = 1.0
    """w in w x conditional + (1 - w) x unconditional; 1 is none."""
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)
    """Guide only while the time of the guided modality lies in this interval."""
    guidance_final_time: Share = 1.0
    """The unconditional branch noises the condition to max(this, its present time); below 1 it is noisy guidance."""
    autoguidance: Weight = 1.0
    """v in v x this network + (1 - v) x a weaker one (arXiv 2406.02507); 1 is none."""

    @model_validator(mode="after")
    def _options_go_together(self) -> Sampling:
        if self.steps > MOST_STEPS:
            raise ValueError(f"steps ({self.steps}) must be at most {MOST_STEPS:,}")
        if self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(f"guidance_interval {self.guidance_interval} must be (lower, upper)")
        if self.order_noise and self.order not in ("confidence", "entropy", "margin"):
            raise ValueError(f"order_noise goes with the confidence, entropy and margin orders, not with {self.order}")
        if self.remask != "none" and self.order != "ancestral":
            raise ValueError(f"remask goes with the ancestral order, not with {self.order}")
        return self


class SampleSheets(Periodic):
    """Samples drawn during training and shown in TensorBoard."""

    count: Positive = 8
    weights: Literal["ema", "raw", "both"] = "ema"
    """The weights that draw them: the first EMA profile, the plain weights, or both, one below the other."""
    sampling: Sampling = Sampling(steps=20)

    @model_validator(mode="after")
    def _ranks_stay_together(self) -> SampleSheets:
        check_for_training(self.sampling)
        return self


class Showcase(Section):
    """What `megadiff launch` makes once the last stage is done: a sheet of samples and the conditioning gap.

    The sheet tells conditions that training has seen from held-out ones.

    If all fields are columns of a table, it measures the errors of `rows` joint samples against the training data.
    """

    prompts: tuple[str, ...] = ()
    """Prompts for the sheet, beside captions of the data."""
    count: Positive = 8
    """Samples per task on the sheet."""
    rows: Positive = 10_000
    """Samples of a table."""
    sampling: Sampling = Sampling()
    gap_pairs: Annotated[int, Field(ge=16)] = 256
    """Held-out pairs over which the conditioning gap is measured."""

    @model_validator(mode="after")
    def _one_network(self) -> Showcase:
        _has_one_network(self.sampling, "a showcase")
        return self


def check_for_training(sampling: Sampling) -> None:
    """Raises ValueError if ranks that train cannot sample so."""
    if sampling.order == "threshold":
        raise ValueError("the threshold order ends when its samples do, and the ranks of a run must make equal calls")
    _has_one_network(sampling, "training")


def _has_one_network(sampling: Sampling, what: str) -> None:
    if sampling.autoguidance != 1:
        raise ValueError(f"autoguidance needs a second network, which {what} has not; leave it out")
