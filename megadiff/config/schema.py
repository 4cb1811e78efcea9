"""What a run is made of. Torch-free: a login node, the launcher and CI import this.

Every model is frozen and refuses unknown keys. Units stand in the names: _s seconds, _bytes, _px.
A modality is (name, space, process, tower depth); nothing here knows about text or images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from megadiff.config.errors import ConfigError
from megadiff.config.run_folder import RunFolder

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
Weight = Annotated[float, Field(ge=0, le=1e6)]
"""Of guidance: what is multiplied by it stays a number."""


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
    start_id: int | None = None
    """What every sequence begins with; None where there is no such mark."""
    end_id: int | None = None
    """The token after which nothing is said any more; None where every position is always data."""
    pad_id: int | None = None
    """What fills the positions after the end mark."""

    @model_validator(mode="after")
    def _ids_exist(self) -> TokenSpace:
        for name, value in (("start_id", self.start_id), ("end_id", self.end_id), ("pad_id", self.pad_id)):
            if value is not None and not 0 <= value < self.vocabulary:
                raise ValueError(f"{name} ({value}) must be below vocabulary ({self.vocabulary})")
        return self


class GaussianProcess(Section):
    """Continuous diffusion: state = alpha(t) * clean + sigma(t) * noise."""

    kind: Literal["gaussian"] = "gaussian"
    schedule: Literal["vp", "cosine", "rectified_flow"] = "rectified_flow"
    """vp: the paper's scaled-linear betas 0.00085..0.012 over 1,000 steps, in continuous time; cosine: alpha is cos(pi t/2)."""
    shift: Annotated[float, Field(gt=0)] = 1.0
    """Of the rectified flow: sigma = shift t / (1 + (shift - 1) t). Above 1 for high resolutions (SD3: sqrt of the ratio of
    pixel counts)."""
    target: Literal["epsilon", "clean", "v", "velocity"] = "velocity"
    """What the network predicts: the noise; the clean state; alpha * noise - sigma * clean; noise - clean."""
    clock: Literal["time", "std"] = "time"
    """What the network is told: t, or the marginal standard deviation sigma(t) (the paper's network)."""
    loss_weight: Literal["uniform", "min_snr"] = "uniform"
    """min_snr: the squared error of the clean state weighs min(alpha^2 / sigma^2, min_snr_gamma) (arXiv 2303.09556)."""
    min_snr_gamma: Annotated[float, Field(gt=0)] = 5.0

    @model_validator(mode="after")
    def _options_fit_schedule(self) -> GaussianProcess:
        flow = self.schedule == "rectified_flow"
        if self.shift != 1 and not flow:
            raise ValueError(f"shift belongs to the rectified_flow schedule, not to {self.schedule}")
        if self.loss_weight == "min_snr" and flow:
            raise ValueError("min_snr weights the vp and cosine schedules; for rectified_flow use logit_normal times")
        return self


CategoricalSchedule = Literal["linear", "cosine", "geometric"]
"""The share 1 - alpha(t) of tokens that noise has reached: t; sin(pi t / 2); 1 - exp(-s(t)), s rising to 20 by equal ratios.
"""


class MaskedProcess(Section):
    """Categorical diffusion with an absorbing mask state: every token is masked independently with probability 1 - alpha(t)."""

    kind: Literal["masked"] = "masked"
    schedule: CategoricalSchedule = "linear"
    loss: Literal["nelbo", "plain"] = "nelbo"
    """nelbo: masked positions, weight -alpha'/(1-alpha) capped; plain: the paper's cross entropy over every position."""
    mask_class: bool = False
    """The paper's head has a class for the mask state, whose only effect is softplus(its logit) in the plain loss."""
    weight_cap: Annotated[float, Field(ge=1.0)] = 20.0
    """Largest NELBO weight in training (evaluation uses the true one)."""
    after_end_weight: Share = 0.1
    """Loss weight of positions after the end mark."""
    padding: Literal["after_end", "pad_id"] = "after_end"
    """Which keys are hidden: positions after the end mark where the tokens are (almost) clean, or (paper) every visible pad."""

    @model_validator(mode="after")
    def _mask_class_is_scored(self) -> MaskedProcess:
        if self.mask_class and self.loss != "plain":
            raise ValueError("mask_class is part of the plain loss (loss: plain)")
        return self


class UniformProcess(Section):
    """Categorical diffusion without a mask: with probability 1 - alpha(t) a token is replaced by a uniformly drawn one.

    For small vocabularies (columns of a table): its bound needs all logits of every position.
    """

    kind: Literal["uniform"] = "uniform"
    schedule: CategoricalSchedule = "linear"
    loss: Literal["nelbo", "plain"] = "plain"
    """plain: the cross entropy of the clean token at every position; nelbo: the likelihood bound, its weight in time capped."""
    weight_cap: Annotated[float, Field(ge=1.0)] = 20.0


Space = Annotated[GridSpace | TokenSpace, Field(discriminator="kind")]
Process = Annotated[GaussianProcess | MaskedProcess | UniformProcess, Field(discriminator="kind")]


class Modality(Section):
    """One thing that is diffused, on its own clock."""

    space: Space
    process: Process
    tower_depth: NotNegative = 0
    """Single-modality blocks between the joint part and the head."""
    width: Positive | None = None
    """Of its tokens; None takes the model's. Attention has one inner width for all."""
    positions: Literal["learned", "sincos", "rope"] = "learned"

    @model_validator(mode="after")
    def _process_fits_space(self) -> Modality:
        wanted = {"grid": ("gaussian",), "tokens": ("masked", "uniform")}[self.space.kind]
        if self.process.kind not in wanted:
            raise ValueError(f"a {self.space.kind} space takes a {' or '.join(wanted)} process, not {self.process.kind}")
        by_pad = isinstance(self.process, MaskedProcess) and self.process.padding == "pad_id"
        if by_pad and isinstance(self.space, TokenSpace) and self.space.pad_id is None:
            raise ValueError("padding: pad_id hides the pads, and the space has no pad_id")
        if self.positions == "sincos" and self.space.kind != "grid":
            raise ValueError("sincos positions are for grids; tokens take learned or rope")
        return self


RESERVED_NAMES = frozenset(
    {"joint", "alignment", "training", "keys", "values", "items", "pop", "clear", "update", "forward", "type"}
)
"""`joint` is a part and a task, `alignment` a part; the others are attributes of torch's module containers."""


class Model(Section):
    """The MMDiT: joint blocks over all modalities, then a tower and a head per predicted modality."""

    modalities: Annotated[dict[Name, Modality], Field(min_length=1)]
    """In the order in which they stand in joint attention."""
    width: Positive
    """Of the tokens of every modality that has no width of its own."""
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
    block_modulation: Literal["one_plus_scale", "scale"] = "one_plus_scale"
    """How a block's normalised tokens are scaled; `scale` as in the paper's network (it starts at 1 all the same)."""
    trunk_norm: bool = False
    """RMSNorm after the joint part and at each tower's end (the paper's network)."""
    head_modulation: Literal["one_plus_scale", "scale"] = "one_plus_scale"
    time_scale: Annotated[float, Field(gt=0)] = 1000.0
    """Factor on clocks before the sinusoids; the paper's network has 1."""
    hidden_projections: dict[Name, Positive] = {}
    """By modality the outputs of a projection of its tokens that stands beside its tower and that nothing reads: the paper's
    network with `project_hidden` has them. They are kept for the way back, and never trained."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Model:
        reserved = [name for name in self.modalities if name in RESERVED_NAMES]
        if reserved:
            raise ValueError(f"{', '.join(reserved)} cannot be the name of a modality; choose another")
        if strangers := [name for name in self.hidden_projections if name not in self.modalities]:
            raise ValueError(
                f"hidden_projections names {', '.join(strangers)}; the modalities are {', '.join(self.modalities)}"
            )
        for name, modality in self.modalities.items():
            if modality.positions == "rope" and self.head_dim % (4 if modality.space.kind == "grid" else 2):
                raise ValueError(f"rope positions of {name} need head_dim ({self.head_dim}) to be a multiple of 4")
            if modality.positions == "sincos" and self.width_of(name) % 4:
                raise ValueError(f"sincos positions of {name} need width ({self.width_of(name)}) to be a multiple of 4")
        return self

    def width_of(self, name: str) -> int:
        """The width of a modality's tokens."""
        return self.modalities[name].width or self.width


# ---------------------------------------------------------------------------------------------------------------- data


class PixelField(Section):
    """A modality read from a picture: resized and centre-cropped to the modality's grid, values in [-1, 1], on white."""

    FILES: ClassVar[tuple[str, ...]] = ()
    """Of every field: its keys that name a file or folder which is needed beside the weights."""
    kind: Literal["pixels"] = "pixels"
    member: str = "png"
    """Ending of the tar member."""


class LatentField(Section):
    """A modality of an autoencoder's latents: read as such from the shards, or made from a picture by the autoencoder."""

    kind: Literal["latents"] = "latents"
    member: str = "latents.npy"
    """Ending of the tar member: a NumPy array, [C, H, W] (a latent) or [2, C, H, W] (mean and deviation, from which one is
    drawn per visit), not yet multiplied by `scale`."""
    FILES: ClassVar = ("autoencoder",)
    autoencoder: str | None = None
    """A local folder with a diffusers AutoencoderKL; needed to read or show pictures."""
    scale: Annotated[float, Field(gt=0)] = 0.18215
    """Latents are multiplied by it, so that their deviation is about 1 (Stable Diffusion's autoencoder: 0.18215)."""


class CaptionField(Section):
    """A modality read from captions: one of the sample's captions is drawn per visit and tokenized."""

    kind: Literal["caption"] = "caption"
    member: str = "json"
    """Ending of the tar member: json with a list under `captions`, txt with one caption, or tokens.npy with their token ids
    (what `megadiff data encode` writes: int32 [captions, longest], filled up with -1, without marks)."""
    FILES: ClassVar = ("tokenizer",)
    tokenizer: str
    """Path of a Hugging Face tokenizer.json."""
    cleaning: Literal["plain", "clip"] = "plain"
    """plain: HTML entities resolved, white space collapsed; clip: ftfy first and lower case after, as CLIP's tokenizer does."""


class NumberField(Section):
    """A 1 x 1 x 1 modality read from a column of numbers, by its rank among the training data's as a normal quantile."""

    kind: Literal["number"] = "number"
    member: str = "json"
    column: str
    FILES: ClassVar = ("columns",)
    columns: str
    """Path of the columns.json that `megadiff data table` writes."""


class ClassField(Section):
    """A modality of one token read from a column of categories."""

    kind: Literal["class"] = "class"
    member: str = "json"
    column: str
    FILES: ClassVar = ("columns",)
    columns: str
    """Path of the columns.json that `megadiff data table` writes."""


FieldSource = Annotated[PixelField | LatentField | CaptionField | NumberField | ClassField, Field(discriminator="kind")]


class Cache(Section):
    """A node-local folder for shards that come from afar, shared by the ranks of the node."""

    folder: LocalPath
    max_bytes: Positive = 100 * 2**30
    """The least used shards are dropped above this; room for what is open (see `Data.cache`) and a few more is the least."""


class Data(Section):
    """Where samples come from and in which order."""

    train: str | Annotated[dict[Name, str], Field(min_length=1)]
    """Manifest of the training shards: a path or an s3://, gs://, az://, http(s):// address; or several by name, which are
    mixed in every batch in the proportion of their sizes, or as a stage's `mixture` says."""
    held_out: str | None = None
    """Manifest of the shards that are never trained on."""
    fields: dict[Name, FieldSource]
    features: dict[Name, str] = {}
    """By modality the ending of a tar member with precomputed features, a NumPy array [S, F]: what a stage may align with."""
    lanes: Positive = 8
    """L: divides the global batch and is a multiple of every number of data-parallel ranks."""
    block_shards: Positive = 4
    """Samples are shuffled within blocks of this many shards' worth of a lane."""
    max_unreadable_share: Share = 0.01
    """A run stops when a larger share of the samples read so far could not be decoded."""
    workers: NotNegative = 2
    """Decoding threads per rank; 0 decodes, and fetches shards, in the training thread."""
    prefetch_batches: Positive = 4
    """Global batches that are decoded ahead."""
    downloads: Positive = 4
    """Shards that a rank fetches at once, ahead of their use."""
    cache: Cache | None = None
    """Without one, distant shards are held in memory: lanes per rank x 1.5 block_shards of them on average."""

    @property
    def sources(self) -> dict[str, str]:
        """Manifests of the training shards, by name."""
        return {"train": self.train} if isinstance(self.train, str) else dict(self.train)

    @property
    def reference(self) -> str:
        """What samples are compared with: the shards that are held out, else the first to train on."""
        return self.held_out or next(iter(self.sources.values()))


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

    @property
    def scored(self) -> bool:
        """Whether its prediction is learnt from: it has a loss, and is not a mere condition in every sample."""
        return self.predicted and self.loss_weight > 0 and self.conditioning.clean + self.conditioning.absent < 1 - 1e-9


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


MOST_STEPS = 1_000_000
"""Of sampling: their times must fit into memory."""


class Sampling(Section):
    """How samples are drawn."""

    steps: Positive = 50
    grid: Literal["auto", "uniform", "square", "karras", "shifted", "paper"] = "auto"
    """Where the steps lie between t = 1 and 0: evenly; evenly in sqrt(t); evenly in (sigma / alpha)^(1/7); pushed towards 1 by
    `grid_shift`; evenly from 1 to 1e-5, and then to 0 (the paper). auto: square where a vp modality is generated, else uniform.
    """
    grid_shift: Annotated[float, Field(gt=0)] = 3.0
    """Of the shifted grid: t = s u / (1 + (s - 1) u)."""
    solver: Literal["euler", "heun", "heun_time", "dpmpp_2m", "sde_euler", "sde_dpmpp_2m"] = "heun"
    """For Gaussian modalities. heun steps along sigma / (alpha + sigma); heun_time along t itself (the paper), for grids that
    come close to 0."""
    order: Literal["ancestral", "tau_leaping", "first_hitting", "confidence", "entropy", "margin", "threshold"] = "ancestral"
    """When categorical positions become visible. ancestral: by the exact reverse process; tau_leaping: by rates held fixed over
    a step (the paper); first_hitting: one at a time at exact times, whatever `steps` (ancestral beside a Gaussian modality);
    confidence, entropy, margin (of the likeliest to the next): the surest first; threshold: all surer than `threshold`."""
    order_noise: Annotated[float, Field(ge=0)] = 0.0
    """Gumbel noise on the score of the confidence, entropy and margin orders, times t."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.9
    remask: Literal["none", "cap", "conf", "loop"] = "none"
    """ReMDM (arXiv 2503.00307), with the ancestral order: visible positions are masked again with a capped probability; the
    less sure ones more often; or while the clock stands still in the middle of the run."""
    remask_strength: Share = 0.05
    """The cap on the probability of masking a position again in a step."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of token draws; 0 takes the likeliest."""
    top_k: NotNegative = 0
    """Draw among this many likeliest tokens; 0 is all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    min_p: Share = 0.0
    """Draw among the tokens that have at least this share of the likeliest one's probability."""
    resample: Positive = 1
    """How often a step is made, its noise put back between, where a part of a modality is known (RePaint, arXiv 2201.09865)."""
    guidance: Weight = 1.0
    """w in w * conditional + (1 - w) * unconditional; 1 is none."""
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)
    """Guide only while the time of the guided modality lies in it."""
    guidance_final_time: Share = 1.0
    """The unconditional branch noises the condition to max(this, its present time); below 1: noisy guidance."""
    autoguidance: Weight = 1.0
    """v in v * this network + (1 - v) * a weaker one (arXiv 2406.02507), where a weaker one is given; 1 is none."""

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


class PeriodicSamples(Section):
    """Samples drawn during training and shown in TensorBoard."""

    every_steps: Positive
    count: Positive = 8
    weights: Literal["ema", "raw", "both"] = "ema"
    """Which draw them: the averages of the first EMA profile, the plain weights, or each of the two, one below the other."""
    sampling: Sampling = Sampling(steps=20)

    @model_validator(mode="after")
    def _ranks_stay_together(self) -> PeriodicSamples:
        if self.sampling.order == "threshold":
            raise ValueError("the threshold order ends when its samples do, and the ranks of a run must make equal calls")
        if self.sampling.autoguidance != 1:
            raise ValueError("autoguidance needs a second network, which training has not; leave it out")
        return self


class Alignment(Section):
    """REPA (arXiv 2410.06940): a modality's tokens after a joint block, projected, should point where given features do."""

    modality: Name
    block: NotNegative
    """After which joint block; 0 is the first."""
    features: Positive
    """Numbers per token in the shards' features."""
    weight: Annotated[float, Field(gt=0)] = 0.5
    """Of the mean (1 - cosine similarity) in the loss."""


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
    alignment: Alignment | None = None
    ema: Annotated[dict[Name, EmaProfile], Field(min_length=1)]
    mixture: dict[Name, Annotated[float, Field(ge=0)]] = {}
    """Shares of the sources in `data.train` in every batch, in any proportion; a source that is not named is not read. Empty:
    in the proportion of their sizes."""
    freeze: tuple[str, ...] = ()
    """Parts that stay as they are: `joint` (embeddings and joint blocks) or a modality's name (its tower and head). What no
    loss of the stage reaches stays as it is without being named."""
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
    """What `megadiff launch` makes once the last stage is done: a sheet of samples and the conditioning gap.

    Where all fields are columns of a table: the error rates of `rows` joint samples against the training data.
    """

    prompts: tuple[str, ...] = ()
    """Prompts for the sheet; empty takes held-out captions."""
    count: Positive = 8
    """Samples per task on the sheet."""
    rows: Positive = 10_000
    """Samples of a table."""
    sampling: Sampling = Sampling()
    gap_pairs: Annotated[int, Field(ge=16)] = 256
    """Held-out pairs over which the conditioning gap is measured."""

    @model_validator(mode="after")
    def _one_network(self) -> Showcase:
        if self.sampling.autoguidance != 1:
            raise ValueError("autoguidance needs a second network, which a showcase has not; leave it out")
        return self


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

    @property
    def paths(self) -> RunFolder:
        """Where everything of the run lies."""
        return RunFolder(Path(self.folder))

    def stage(self, name: str) -> Stage:
        """Raises ConfigError if the run has no such stage."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(f"the run has no stage {name}; its stages: {', '.join(stage.name for stage in self.stages)}")

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
        if self.showcase is not None:
            faults += _invisible(self, "showcase") + _order_faults(self.model, self.showcase.sampling, "showcase")
        if unknown := [name for name in self.data.features if name not in known]:
            faults.append(f"data.features names {', '.join(unknown)}; the model's modalities are {', '.join(known)}")
        if faults:
            raise ValueError("; ".join(faults))
        return self


def _field_faults(name: str, run: Run) -> list[str]:
    field, space = run.data.fields[name], run.model.modalities[name].space
    where = f"data.fields.{name}"
    match field, space:
        case PixelField(), GridSpace():
            fits = space.channels in (1, 3)
            return [] if fits else [f"{where} is pixels, which fill 1 or 3 channels, and its grid has {space.channels}"]
        case NumberField(), GridSpace():
            fits = (space.channels, space.height, space.width) == (1, 1, 1)
            return [] if fits else [f"{where} is a number, which fills a grid of 1 x 1 x 1"]
        case ClassField(), TokenSpace():
            fits = space.length == 1 and space.end_id is None
            return [] if fits else [f"{where} is a class, which fills a token space of length 1 without an end_id"]
        case (LatentField(), GridSpace()) | (CaptionField(), TokenSpace()):
            return []
    return [f"{where} is {field.kind}, which cannot fill a {space.kind} space"]


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
    if strangers := [name for name in stage.mixture if name not in run.data.sources]:
        faults.append(f"mixture names {', '.join(strangers)}; data.train has {', '.join(run.data.sources)}")
    elif stage.mixture and not any(stage.mixture.values()):
        faults.append("every weight of the mixture is 0; give one source at least a share")
    parts = ["joint", *known, *(["alignment"] if stage.alignment else [])]
    unknown = [part for part in stage.freeze if part not in parts]
    if unknown:
        faults.append(f"freeze names {', '.join(unknown)}; known parts: {', '.join(parts)}")
    if not any(modality.predicted and modality.loss_weight > 0 for modality in stage.modalities.values()):
        faults.append("no modality is predicted with a loss weight above 0")
    elif not any(modality.scored for modality in stage.modalities.values()):
        faults.append(
            "every modality with a loss is a condition in all samples; let its conditioning shares add up to less than 1"
        )
    if stage.samples is not None:
        faults += _invisible(run, "samples") + _order_faults(run.model, stage.samples.sampling, "samples")
    if stage.alignment is not None:
        faults += _alignment_faults(stage.alignment, run)
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
        if modality.predicted and modality.loss_weight > 0 and "joint" in stage.freeze and name in stage.freeze:
            faults.append(f"{name}: joint and {name} are frozen, so its loss trains nothing; set its loss_weight to 0")
    return [where + fault for fault in faults]


def _order_faults(model: Model, sampling: Sampling, section: str) -> list[str]:
    """Orders of unmasking need a mask."""
    maskless = [name for name, modality in model.modalities.items() if isinstance(modality.process, UniformProcess)]
    if not maskless or (sampling.order in ("ancestral", "tau_leaping") and sampling.remask == "none"):
        return []
    wanted = sampling.order if sampling.remask == "none" else f"remask: {sampling.remask}"
    return [f"{section}: {', '.join(maskless)} has no mask state, which {wanted} needs; take ancestral or tau_leaping"]


def _invisible(run: Run, section: str) -> list[str]:
    """Latents cannot be shown without their autoencoder."""
    blind = [name for name, f in run.data.fields.items() if isinstance(f, LatentField) and f.autoencoder is None]
    return [f"{section} shows {name}, which needs data.fields.{name}.autoencoder" for name in blind]


def _alignment_faults(alignment: Alignment, run: Run) -> list[str]:
    faults = []
    if alignment.modality not in run.model.modalities:
        faults.append(f"alignment.modality is {alignment.modality}; the model has {', '.join(run.model.modalities)}")
    elif alignment.modality not in run.data.features:
        faults.append(f"alignment needs the shards' features: name their member under data.features.{alignment.modality}")
    if alignment.block >= run.model.joint_depth:
        faults.append(f"alignment.block is {alignment.block}; the joint blocks are 0 to {run.model.joint_depth - 1}")
    return faults
