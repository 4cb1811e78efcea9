"""What a run is made of. Torch-free: a login node, the launcher and CI import this.

Every model is frozen and refuses unknown keys. Units stand in the names: _s seconds, _bytes, _px.
A modality is (name, space, process, tower depth); nothing here knows about text or images.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


def _is_path(text: str) -> str:
    if not text or "://" in text:
        raise ValueError(f"{text!r} must be a path on a file system, not an address")
    return text


LocalPath = Annotated[str, AfterValidator(_is_path)]
"""A path on a (shared) file system, not the address of an object store."""
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# ---------------------------------------------------------------------------------------------------------- modalities


class GridSpace(Section):
    """A modality of real numbers on a grid (an image, a latent; 1 x 1 x 1 for a number), cut into square patches."""

    kind: Literal["grid"] = "grid"
    channels: Positive
    height: Positive
    width: Positive
    patch: Positive = 1

    @model_validator(mode="after")
    def _patches_fit(self) -> GridSpace:
        if self.height % self.patch or self.width % self.patch:
            raise ValueError(f"patch ({self.patch}) must divide height ({self.height}) and width ({self.width})")
        return self


class TokenSpace(Section):
    """A modality of token ids below `vocabulary`; the mask state has the id `vocabulary` and is never predicted."""

    kind: Literal["tokens"] = "tokens"
    vocabulary: Annotated[int, Field(ge=2)]
    length: Positive
    end_id: int | None = None
    """The token after which nothing is said any more; None where every position is always data."""
    pad_id: int | None = None
    """What fills the positions after the end mark."""

    @model_validator(mode="after")
    def _ids_exist(self) -> TokenSpace:
        for name, value in (("end_id", self.end_id), ("pad_id", self.pad_id)):
            if value is not None and not 0 <= value < self.vocabulary:
                raise ValueError(f"{name} ({value}) must be below vocabulary ({self.vocabulary})")
        return self


class GaussianProcess(Section):
    """Continuous diffusion: state = alpha(t) * clean + sigma(t) * noise."""

    kind: Literal["gaussian"] = "gaussian"
    schedule: Literal["vp", "rectified_flow"] = "rectified_flow"
    """vp: the paper's scaled-linear betas 0.00085..0.012 over 1,000 steps, in continuous time."""
    target: Literal["epsilon", "velocity"] = "velocity"
    """What the network predicts. velocity = d state / d t for the flow, and alpha * noise - sigma * clean for vp."""
    clock: Literal["time", "std"] = "time"
    """What the network is told: t, or the marginal standard deviation sigma(t) (the paper's network)."""


class MaskedProcess(Section):
    """Categorical diffusion with an absorbing mask state: every token is masked independently with probability t."""

    kind: Literal["masked"] = "masked"
    schedule: Literal["linear"] = "linear"
    loss: Literal["nelbo", "plain"] = "nelbo"
    """nelbo: masked positions, weight -alpha'/(1-alpha) capped; plain: the paper's cross entropy over every position."""
    weight_cap: Annotated[float, Field(ge=1.0)] = 20.0
    """Largest NELBO weight in training (evaluation uses the true one)."""
    after_end_weight: Share = 0.1
    """Loss weight of positions after the end mark."""
    padding: Literal["after_end", "pad_id"] = "after_end"
    """Which keys are hidden: positions after the end mark where the tokens are (almost) clean, or (paper) every visible pad."""


Space = Annotated[GridSpace | TokenSpace, Field(discriminator="kind")]
Process = Annotated[GaussianProcess | MaskedProcess, Field(discriminator="kind")]


class Modality(Section):
    """One thing that is diffused, on its own clock."""

    space: Space
    process: Process
    tower_depth: NotNegative = 0
    """Single-modality blocks between the joint part and the head."""
    positions: Literal["learned", "sincos", "rope"] = "learned"

    @model_validator(mode="after")
    def _process_fits_space(self) -> Modality:
        wanted = {"grid": "gaussian", "tokens": "masked"}[self.space.kind]
        if self.process.kind != wanted:
            raise ValueError(f"a {self.space.kind} space takes a {wanted} process, not {self.process.kind}")
        if self.positions == "sincos" and self.space.kind != "grid":
            raise ValueError("sincos positions are for grids; tokens take learned or rope")
        return self


RESERVED_NAMES = frozenset({"joint", "training", "keys", "values", "items", "pop", "clear", "update", "forward", "type"})
"""`joint` is a part and a task; the others are attributes of torch's module containers."""


class Model(Section):
    """The MMDiT: joint blocks over all modalities, then a tower and a head per predicted modality."""

    modalities: Annotated[dict[Name, Modality], Field(min_length=1)]
    """In the order in which they stand in joint attention."""
    width: Positive
    heads: Positive
    head_dim: Positive
    """The attention's inner width is heads x head_dim, whatever the width."""
    joint_depth: NotNegative
    mlp: Literal["gelu", "swiglu"] = "swiglu"
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Hidden width / width for gelu; swiglu takes 2/3 of it (rounded up to 8), so that both cost the same."""
    qk_norm: bool = True
    attention_bias: bool = False
    gates: Literal["zero", "one"] = "zero"
    """Initial value of the residual gates: zero (adaLN-Zero) or one (the paper's code)."""
    trunk_norm: bool = False
    """RMSNorm after the joint part and at each tower's end (the paper's network)."""
    head_modulation: Literal["one_plus_scale", "scale"] = "one_plus_scale"
    time_scale: Annotated[float, Field(gt=0)] = 1000.0
    """Factor on clocks before the sinusoids; the paper's network has 1."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Model:
        reserved = [name for name in self.modalities if name in RESERVED_NAMES]
        if reserved:
            raise ValueError(f"{', '.join(reserved)} cannot be the name of a modality; choose another")
        for name, modality in self.modalities.items():
            if modality.positions == "rope" and self.head_dim % (4 if modality.space.kind == "grid" else 2):
                raise ValueError(f"rope positions of {name} need head_dim ({self.head_dim}) to be a multiple of 4")
            if modality.positions == "sincos" and self.width % 4:
                raise ValueError(f"sincos positions of {name} need width ({self.width}) to be a multiple of 4")
        return self


# ---------------------------------------------------------------------------------------------------------------- data


class PixelField(Section):
    """A modality read from a picture: resized and centre-cropped to the modality's grid, values in [-1, 1], on white."""

    kind: Literal["pixels"] = "pixels"
    member: str = "png"
    """Ending of the tar member."""


class CaptionField(Section):
    """A modality read from captions: one of the sample's captions is drawn per visit and tokenized."""

    kind: Literal["caption"] = "caption"
    member: str = "json"
    """Ending of the tar member: json with a list under `captions`, or txt with one caption."""
    tokenizer: str
    """Path of a Hugging Face tokenizer.json."""


FieldSource = Annotated[PixelField | CaptionField, Field(discriminator="kind")]


class Cache(Section):
    """A node-local folder for shards that come from afar."""

    folder: LocalPath
    max_bytes: Positive = 100 * 2**30


class Data(Section):
    """Where samples come from and in which order."""

    train: str
    """Manifest of the training shards: a path or an s3://, gs://, az://, http(s):// address."""
    held_out: str | None = None
    """Manifest of the shards that are never trained on."""
    fields: dict[Name, FieldSource]
    lanes: Positive = 8
    """L: divides the global batch and is a multiple of every number of data-parallel ranks."""
    block_shards: Positive = 4
    """Samples are shuffled within blocks of this many shards' worth of a lane."""
    max_unreadable_share: Share = 0.01
    """A run stops when a larger share of the samples read so far could not be decoded."""
    workers: NotNegative = 2
    """Decoding threads per rank; 0 decodes in the training thread."""
    prefetch_batches: Positive = 4
    cache: Cache | None = None
    """Without one, distant shards are held in memory: lanes per rank x (block_shards + 2) of them."""


# --------------------------------------------------------------------------------------------------------------- stages


class UniformTimes(Section):
    kind: Literal["uniform"] = "uniform"


class LogitNormalTimes(Section):
    """t = sigmoid(location + scale * normal), with a share of uniform times so that both ends stay trained."""

    kind: Literal["logit_normal"] = "logit_normal"
    location: float = 0.0
    scale: Annotated[float, Field(gt=0)] = 1.0
    uniform_share: Share = 0.2


class Conditioning(Section):
    """Shares of samples in which this modality is only a condition; it is not scored there."""

    clean: Share = 0.0
    """Held at t = 0 (given)."""
    absent: Share = 0.0
    """Held at t = 1 (unknown)."""


class StageModality(Section):
    """How one modality is trained in a stage."""

    predicted: bool = True
    """False: the modality is read but has neither tower nor head in this stage."""
    loss_weight: Annotated[float, Field(ge=0.0)] = 1.0
    """0: present, but neither its tower nor its head is run."""
    times: Annotated[UniformTimes | LogitNormalTimes, Field(discriminator="kind")] = UniformTimes()
    conditioning: Conditioning = Conditioning()


class Batching(Section):
    """global_samples = micro_batch x data-parallel ranks x accumulation; accumulation follows from the other three."""

    global_samples: Positive
    micro_batch: Positive


class Optimizer(Section):
    """AdamW and its schedule."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.03
    decay_all: bool = False
    """True decays gains, biases and embeddings as well (the paper's code)."""
    warmup_steps: NotNegative = 100
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    final_ratio: Share = 0.0
    """Learning rate at the end / peak, for cosine and linear."""
    gradient_clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; 0 is off."""


class ConstantEma(Section):
    """ema <- decay * ema + (1 - decay) * weights."""

    kind: Literal["constant"] = "constant"
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9999
    warmup: bool = True
    """Use min(decay, (1 + n) / (10 + n)) after n updates, so that a short run is not dominated by its first weights."""


class PowerEma(Section):
    """EDM2's power-function profile: the decay grows with the step so that the averaged span is a fixed share of the run."""

    kind: Literal["power"] = "power"
    length: Annotated[float, Field(gt=0, lt=0.29)] = 0.05
    """Relative standard deviation of the profile (sigma_rel)."""


EmaProfile = Annotated[ConstantEma | PowerEma, Field(discriminator="kind")]


class Initialise(Section):
    """Where a stage's weights come from."""

    source: str | None = None
    """None: fresh. `previous`: the last checkpoint of the stage before. Else a checkpoint folder."""
    weights: Literal["ema", "raw"] = "ema"
    ema: Name | None = None
    """Which EMA profile; None takes the first."""
    new: tuple[str, ...] = ()
    """Parts (see `freeze`) or parameter-name patterns (fnmatch) that the source lacks and that start fresh."""
    dropped: tuple[str, ...] = ()
    """Likewise for what the source has and this stage does not."""


class Checkpointing(Section):
    """When checkpoints are written and which ones stay."""

    every_steps: Positive = 1000
    keep: Positive = 3
    """The newest this many stay."""
    keep_every_steps: Positive | None = None
    """Checkpoints at multiples of this stay for good."""


class Sampling(Section):
    """How samples are drawn."""

    steps: Positive = 50
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """w in w * conditional + (1 - w) * unconditional; 1 is none."""
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)
    """Guide only while the time of the guided modality lies in it."""
    guidance_final_time: Share = 1.0
    """The unconditional branch noises the condition to max(this, its present time); below 1: noisy guidance."""

    @model_validator(mode="after")
    def _interval_is_ordered(self) -> Sampling:
        if self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(f"guidance_interval {self.guidance_interval} must be (lower, upper)")
        return self


class PeriodicSamples(Section):
    """Samples drawn during training and shown in TensorBoard."""

    every_steps: Positive
    count: Positive = 8
    sampling: Sampling = Sampling(steps=20)


class Stage(Section):
    """One stage of training, complete (load.py merges it from the run's defaults and the stage's differences)."""

    name: Name
    steps: Positive
    """Optimizer steps."""
    modalities: dict[Name, StageModality]
    batch: Batching
    optimizer: Optimizer = Optimizer()
    precision: Literal["bf16", "fp32", "auto"] = "auto"
    """auto: bf16 on an accelerator, fp32 on a CPU."""
    activation_checkpointing: bool = False
    antithetic_times: bool = True
    """Spread the times of a global batch evenly (low discrepancy)."""
    ema: Annotated[dict[Name, EmaProfile], Field(min_length=1)]
    freeze: tuple[str, ...] = ()
    """Parts that stay as they are: `joint` (embeddings and joint blocks) or a modality's name (its tower and head)."""
    initialise: Initialise = Initialise()
    checkpoint: Checkpointing = Checkpointing()
    samples: PeriodicSamples | None = None
    log_every_steps: Positive = 10


class Launch(Section):
    """How `megadiff launch` starts ranks on this machine."""

    processes: Positive | Literal["accelerators"] = "accelerators"
    """Ranks on this machine; `accelerators`: one per GPU, or one on a machine without."""
    threads_per_process: Positive | None = None
    """OMP_NUM_THREADS of each rank; None divides the cores."""


class Showcase(Section):
    """What `megadiff launch` makes once the last stage is done: a sheet of samples and the conditioning gap."""

    prompts: tuple[str, ...] = ()
    """Prompts for the sheet; empty takes held-out captions."""
    count: Positive = 8
    """Samples per task on the sheet."""
    sampling: Sampling = Sampling()
    gap_pairs: Annotated[int, Field(ge=16)] = 256
    """Held-out pairs over which the conditioning gap is measured."""


class Run(Section):
    """A whole run: one model, one source of data, a chain of stages."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    folder: LocalPath
    """A folder that all ranks share. Where checkpoints, logs and samples go."""
    seed: int = Field(default=0, ge=0, lt=2**62)
    model: Model
    data: Data
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    launch: Launch = Launch()
    showcase: Showcase | None = None

    @model_validator(mode="after")
    def _parts_agree(self) -> Run:
        faults: list[str] = []
        known = list(self.model.modalities)
        if sorted(self.data.fields) != sorted(known):
            faults.append(f"data.fields ({', '.join(self.data.fields)}) must name the model's modalities ({', '.join(known)})")
        faults += [fault for name in known if name in self.data.fields for fault in _field_faults(name, self)]
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            faults.append(f"stage names must differ: {', '.join(names)}")
        for index, stage in enumerate(self.stages):
            faults += _stage_faults(stage, self, first=index == 0)
        if faults:
            raise ValueError("; ".join(faults))
        return self


def _field_faults(name: str, run: Run) -> list[str]:
    field, space = run.data.fields[name], run.model.modalities[name].space
    if isinstance(field, PixelField) and isinstance(space, GridSpace):
        fits = space.channels in (1, 3)
        return [] if fits else [f"data.fields.{name} is pixels, which fill 1 or 3 channels, and its grid has {space.channels}"]
    if isinstance(field, CaptionField) and isinstance(space, TokenSpace):
        return []
    return [f"data.fields.{name} is {field.kind}, which cannot fill a {space.kind} space"]


def _stage_faults(stage: Stage, run: Run, *, first: bool) -> list[str]:
    where = f"stage {stage.name}: "
    known = list(run.model.modalities)
    faults = []
    if sorted(stage.modalities) != sorted(known):
        faults.append(f"modalities ({', '.join(stage.modalities)}) must be the model's ({', '.join(known)})")
    if stage.batch.global_samples % run.data.lanes:
        count = stage.batch.global_samples
        below = count // run.data.lanes * run.data.lanes
        faults.append(
            f"batch.global_samples ({count}) must be a multiple of data.lanes ({run.data.lanes}); "
            f"nearest: {below or run.data.lanes} or {below + run.data.lanes}"
        )
    unknown = [part for part in stage.freeze if part != "joint" and part not in known]
    if unknown:
        faults.append(f"freeze names {', '.join(unknown)}; known parts: joint, {', '.join(known)}")
    if not any(modality.predicted and modality.loss_weight > 0 for modality in stage.modalities.values()):
        faults.append("no modality is predicted with a loss weight above 0")
    shares = sum(m.conditioning.clean + m.conditioning.absent for m in stage.modalities.values())
    if shares > 1 + 1e-9:
        faults.append(f"the conditioning shares of all modalities add up to {shares:g}; at most 1")
    if first and stage.initialise.source == "previous":
        faults.append("initialise.source is `previous`, but this is the first stage")
    for name, modality in stage.modalities.items():
        space = run.model.modalities[name].space.kind if name in known else "grid"
        if modality.times.kind == "logit_normal" and space == "tokens":
            faults.append(
                f"{name}: logit-normal times are for grids; tokens take uniform times (the NELBO weight assumes them)"
            )
        trains = modality.predicted and modality.loss_weight > 0
        if trains and "joint" in stage.freeze and name in stage.freeze:
            faults.append(f"{name}: joint and {name} are frozen, so its loss trains nothing; set its loss_weight to 0")
    return [where + fault for fault in faults]
