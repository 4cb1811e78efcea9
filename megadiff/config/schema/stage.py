"""A stage of training: what is learnt, batches, the optimizer, averages, checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megadiff.config.schema.base import Momentum, Name, NotNegative, Positive, Section, Share
from megadiff.config.schema.evaluation import BestCheckpoint, Evaluation, HeldOutLoss
from megadiff.config.schema.sampling import SampleSheets

PREVIOUS, PREVIOUS_BEST = "previous", "previous/best"


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
    def has_loss(self) -> bool:
        """Whether its tower and head are run."""
        return self.predicted and self.loss_weight > 0

    @property
    def scored(self) -> bool:
        """Whether its prediction is learnt from: it has a loss, and is not a mere condition in every sample."""
        return self.has_loss and self.conditioning.clean + self.conditioning.absent < 1 - 1e-9


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
    """None: fresh. `previous`: the last checkpoint of the stage before; `previous/best`: its best. Else a checkpoint folder,
    RUN/best, one in DeepSpeed's universal format (`weights: raw`), or the address of a copy (`checkpoint.remote`)
    of a checkpoint, a run or RUN/best."""
    weights: Literal["ema", "raw"] = "ema"
    ema: Name | None = None
    """Which EMA profile; None takes the first."""
    new: tuple[str, ...] = ()
    """Parts (see `freeze`) or parameter-name patterns (fnmatch) that the source lacks and that start fresh."""
    dropped: tuple[str, ...] = ()
    """Parts or patterns that the source has and this stage does not."""

    @property
    def from_previous(self) -> bool:
        """Whether the weights come from the stage before."""
        return self.source in (PREVIOUS, PREVIOUS_BEST)


class Checkpointing(Section):
    """When checkpoints are written and which ones stay."""

    every_steps: Positive = 1000
    keep: Positive = 3
    """Number of newest checkpoints that stay."""
    best: BestCheckpoint | None = None
    keep_every_steps: Positive | None = None
    """Checkpoints at multiples of this stay for good."""
    remote: str | None = None
    """A folder of an object store, s3://BUCKET/runs/NAME: published checkpoints are copied there, and if the run's own folder
    has none that is whole, the stage goes on from there."""
    remote_keep: Positive = 3
    """Number of newest copies that stay there; `keep_every_steps` holds there as well."""
    asynchronous: bool = True
    """Steps go on while a checkpoint is written: they wait only for a copy in host memory, which stays taken (weights, moments
    and averages that the rank saves, once). False writes without the copy, and steps wait for the disk."""


class Alignment(Section):
    """REPA (arXiv 2410.06940): a modality's tokens after a joint block, projected, should point where given features do."""

    modality: Name
    block: NotNegative
    """The joint block whose output is aligned; 0 is the first."""
    features: Positive
    """Numbers per token in the shards' features."""
    weight: Annotated[float, Field(gt=0)] = 0.5
    """Weight of the mean (1 - cosine similarity) in the loss."""


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
    compile: bool = False
    """Compile blocks for training (torch.compile; on a CPU that needs a C++ compiler). The first start takes minutes longer,
    later ones find the result in a cache."""
    antithetic_times: bool = True
    """Spread the times of a global batch evenly (low discrepancy)."""
    alignment: Alignment | None = None
    ema: Annotated[dict[Name, EmaProfile], Field(min_length=1)]
    mixture: dict[Name, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Shares of the sources of `data.train` in every batch, on any scale; a source that is not named is not read. Empty takes
    the sources' sizes."""
    freeze: tuple[str, ...] = ()
    """Parts that are not trained: `joint` (embeddings and joint blocks) or a modality's name (its tower and head). Parameters
    that no loss of the stage reaches are not trained either and need not be named."""
    initialise: Initialise = Initialise()
    checkpoint: Checkpointing = Checkpointing()
    samples: SampleSheets | None = None
    held_out_loss: HeldOutLoss | None = None
    evaluation: Evaluation | None = None
    log_every_steps: Positive = 10
