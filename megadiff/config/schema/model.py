"""The model: spaces, processes, modalities. A modality is (name, space, process, tower depth); nothing here knows about text or
images.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from megadiff.config.schema.base import Name, NotNegative, Positive, Section, Share


class GridSpace(Section):
    """A modality of real numbers on a grid (an image, a latent; 1 x 1 x 1 for a number), cut into patches."""

    kind: Literal["grid"] = "grid"
    channels: Positive
    height: Positive
    width: Positive
    patch: Positive | tuple[Positive, Positive] = 1
    """Side of the patches that become tokens; [height, width] if they are not square."""

    @field_validator("patch")
    @classmethod
    def _one_side_is_enough(cls, patch: int | tuple[int, int]) -> int | tuple[int, int]:
        return patch[0] if isinstance(patch, tuple) and patch[0] == patch[1] else patch

    @model_validator(mode="after")
    def _patches_fit(self) -> GridSpace:
        height, width = self.patch_sides
        if self.height % height or self.width % width:
            raise ValueError(f"patch ({self.patch}) must divide height ({self.height}) and width ({self.width})")
        return self

    @property
    def patch_sides(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return (self.patch, self.patch) if isinstance(self.patch, int) else self.patch

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.patch_sides
        return self.height // height, self.width // width


class TokenSpace(Section):
    """A modality of token ids below `vocabulary`; the mask state has the id `vocabulary` and is never predicted."""

    kind: Literal["tokens"] = "tokens"
    vocabulary: Annotated[int, Field(ge=2)]
    length: Positive
    start_id: int | None = None
    """First token of every sequence; None without such a mark."""
    end_id: int | None = None
    """The token that ends a sequence; None if every position is always data."""
    pad_id: int | None = None
    """The token that fills the positions after the end mark."""

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
    """shift of the rectified flow: sigma = shift t / (1 + (shift - 1) t). Above 1 for high resolutions (SD3: sqrt of the ratio
    of pixel counts)."""
    target: Literal["epsilon", "clean", "v", "velocity"] = "velocity"
    """The network's prediction: the noise; the clean state; alpha * noise - sigma * clean; noise - clean."""
    clock: Literal["time", "std"] = "time"
    """The network's time input: t, or the marginal standard deviation sigma(t) (the paper's network)."""
    loss_weight: Literal["uniform", "min_snr", "velocity"] = "uniform"
    """min_snr: the squared error of the clean state weighs min(alpha^2 / sigma^2, min_snr_gamma) (arXiv 2303.09556); velocity,
    for target clean: it weighs what the velocity's would, near t = 0 400 at most (arXiv 2511.13720)."""
    min_snr_gamma: Annotated[float, Field(gt=0)] = 5.0

    @model_validator(mode="after")
    def _options_fit_schedule(self) -> GaussianProcess:
        flow = self.schedule == "rectified_flow"
        if self.shift != 1 and not flow:
            raise ValueError(f"shift belongs to the rectified_flow schedule, not to {self.schedule}")
        if self.loss_weight == "min_snr" and flow:
            raise ValueError("min_snr weights the vp and cosine schedules; for rectified_flow use logit_normal times")
        if self.loss_weight == "velocity" and self.target != "clean":
            raise ValueError(f"loss_weight velocity belongs to target clean, not to {self.target}")
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
    """Width of its tokens; None takes the model's. Attention has one inner width for all modalities."""
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


# fmt: off
RESERVED_NAMES = frozenset({
    "joint", "alignment", "hidden_projections",
    "add_module", "apply", "bfloat16", "buffers", "call_super_init", "children", "clear", "compile", "cpu", "cuda",
    "double", "dump_patches", "eval", "extra_repr", "float", "forward", "get_buffer", "get_extra_state", "get_parameter",
    "get_submodule", "half", "ipu", "items", "keys", "load_state_dict", "modules", "mtia", "named_buffers",
    "named_children", "named_modules", "named_parameters", "parameters", "pop", "register_backward_hook", "register_buffer",
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook",
    "register_load_state_dict_post_hook", "register_load_state_dict_pre_hook", "register_module", "register_parameter",
    "register_state_dict_post_hook", "register_state_dict_pre_hook", "requires_grad_", "set_extra_state", "set_submodule",
    "share_memory", "smart_apply", "state_dict", "to", "to_empty", "train", "training", "type", "update", "values", "xpu",
    "zero_grad",
})
# fmt: on
"""Names that no modality may have: the first three are parts of the model (`joint` is a task as well), the others attributes of
torch's ModuleDict (transformers adds `smart_apply`), whose modules cannot have such names; a test compares them."""


class Model(Section):
    """The MMDiT: joint blocks over all modalities, then a tower and a head per predicted modality."""

    modalities: Annotated[dict[Name, Modality], Field(min_length=1)]
    """By name, in the order of their tokens in joint attention."""
    width: Positive
    """Width of the tokens of modalities that have none of their own."""
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
    hidden_projections: dict[Name, Positive] = Field(default_factory=dict)
    """Outputs, by modality, of a projection beside its tower that nothing reads and no stage trains. The paper's network with
    `project_hidden` has such projections; they are kept for exports to its format."""

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
