"""An independent, plain re-statement of the released network's forward pass, to check the project's own against.

Written from a description in words alone (section 6 of the paper notes), by an author who had seen neither the project's
implementation nor the original code. It has no modules and no fused functions: a state is a dictionary of tensors under the
released names, and attention, norms and softmax are spelled out. B samples, L text positions, N tokens, width D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]
MODALITIES = ("text", "image")  # index M in the names: 0 text, 1 image


@dataclass(frozen=True)
class Config:
    """Sizes of the network; `vocab_size` is V + 1, the mask entry included."""

    img_resolution: int
    patch_size: int
    img_channels: int
    vocab_size: int
    context_len: int
    depth: int
    text_depth: int
    image_depth: int
    dims: tuple[int, int]  # of text and image
    heads: int
    head_dim: int
    pad_id: int
    time_features: int = 256


# --- A random state under the released names


class _Filler:
    """Collects random float32 tensors in a state."""

    def __init__(self, seed: int) -> None:
        self.state: State = {}
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        self.state[name] = mean + std * torch.randn(shape, generator=self.generator)

    def linear(self, name: str, fan_in: int, fan_out: int, bias: bool = True) -> None:
        self.normal(f"{name}.weight", fan_out, fan_in, std=fan_in**-0.5)
        if bias:
            self.normal(f"{name}.bias", fan_out, std=0.2)


def sincos_positions(config: Config) -> Tensor:
    """The fixed buffer [1, (R / p)^2, D]: columns in the first half of the channels, rows in the second, each [sin, cos]."""
    dim = config.dims[1]
    side, quarter = config.img_resolution // config.patch_size, dim // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, D / 2]
    columns = line[None, :, :].expand(side, side, -1)
    rows = line[:, None, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, side * side, dim).float()


def _fill_block(filler: _Filler, config: Config, block: str, dims: Sequence[int]) -> None:
    inner = config.heads * config.head_dim
    for m, dim in enumerate(dims):
        filler.linear(f"{block}.attn_layernorms.{m}.to_cond.2", dim, 2 * dim)
        filler.linear(f"{block}.ff_layernorms.{m}.to_cond.2", dim, 2 * dim)
        filler.linear(f"{block}.cond_dict.cond_linear_{m}", dim, 2 * dim)
        for part in ("weight", "bias"):
            shared = filler.state[f"{block}.cond_dict.cond_linear_{m}.{part}"]
            filler.state[f"{block}.cond_dict.to_post_branch_gammas_{m}.2.{part}"] = shared
        filler.linear(f"{block}.joint_attn.to_qkv.{m}", dim, 3 * inner, bias=False)
        filler.linear(f"{block}.joint_attn.to_out.{m}", inner, dim, bias=False)
        for which in ("q", "k"):
            filler.normal(f"{block}.joint_attn.{which}_rmsnorms.{m}.gamma", config.heads, 1, config.head_dim, std=0.2, mean=1.0)
        filler.linear(f"{block}.feedforwards.{m}.ff.0.0", dim, 4 * dim)
        filler.linear(f"{block}.feedforwards.{m}.ff.2", 4 * dim, dim)


def _fill_stack(filler: _Filler, config: Config, stack: str, depth: int, dims: Sequence[int]) -> None:
    for index in range(depth):
        _fill_block(filler, config, f"{stack}.blocks.{index}", dims)
    for m, dim in enumerate(dims):
        filler.normal(f"{stack}.norms.{m}.g", dim, std=0.2, mean=1.0)


def random_state(config: Config, seed: int) -> State:
    """A float32 state with the released names and shapes; all of it random but the fixed `pos_embed`."""
    filler, patch, channels = _Filler(seed), config.patch_size, config.img_channels
    text_dim, image_dim = config.dims
    filler.normal("text_embedder.weight", config.vocab_size, text_dim, std=1.0)
    filler.normal("text_pos_embed", 1, config.context_len, text_dim, std=0.3)
    filler.normal("image_embedder.proj.weight", image_dim, channels, patch, patch, std=(channels * patch * patch) ** -0.5)
    filler.normal("image_embedder.proj.bias", image_dim, std=0.2)
    filler.state["pos_embed"] = sincos_positions(config)
    for modality, dim in zip(MODALITIES, config.dims, strict=True):
        filler.linear(f"{modality}_time_encoder.mlp.0", config.time_features, dim)
        filler.linear(f"{modality}_time_encoder.mlp.2", dim, dim)
    _fill_stack(filler, config, "joint_embedding", config.depth, config.dims)
    _fill_stack(filler, config, "text_dit", config.text_depth, [text_dim])
    _fill_stack(filler, config, "image_dit", config.image_depth, [image_dim])
    for modality, dim, outputs in (("text", text_dim, config.vocab_size), ("image", image_dim, patch * patch * channels)):
        filler.linear(f"{modality}_final_layer.adaLN_modulation.2", dim, 2 * dim)
        filler.linear(f"{modality}_final_layer.linear", dim, outputs)
    return filler.state


# --- Elementary operations


def _linear(state: State, name: str, x: Tensor, bias: bool = True) -> Tensor:
    out = torch.matmul(x, state[f"{name}.weight"].T)
    return out + state[f"{name}.bias"] if bias else out


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _layer_norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(dim=-1, keepdim=True) + eps)


def _length_norm(x: Tensor, gain: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) * sqrt(channels) * gain."""
    length = torch.sqrt((x * x).sum(dim=-1, keepdim=True))
    return x / length.clamp(min=1e-12) * math.sqrt(x.shape[-1]) * gain


def _modulation(state: State, name: str, c: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves, each [B, 1, D], of Linear(SiLU(c))."""
    both = _linear(state, name, _silu(c))[:, None, :]
    half = both.shape[-1] // 2
    return both[..., :half], both[..., half:]


# --- The network


def _time_vector(state: State, config: Config, modality: str, time: Tensor) -> Tensor:
    half = config.time_features // 2
    k = torch.arange(half, dtype=time.dtype, device=time.device)
    angles = time[:, None] * torch.exp(-math.log(10000.0) * k / half)
    features = torch.cat([angles.cos(), angles.sin()], dim=1)
    hidden = _silu(_linear(state, f"{modality}_time_encoder.mlp.0", features))
    return _linear(state, f"{modality}_time_encoder.mlp.2", hidden)


def _embed_text(state: State, ids: Tensor) -> Tensor:
    return state["text_embedder.weight"][ids] + state["text_pos_embed"]


def _embed_image(state: State, config: Config, image: Tensor) -> Tensor:
    batch, channels, patch = image.shape[0], config.img_channels, config.patch_size
    side = config.img_resolution // patch
    cells = image.reshape(batch, channels, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
    patches = cells.reshape(batch, side * side, channels * patch * patch)
    weight = state["image_embedder.proj.weight"].reshape(config.dims[1], -1)
    return torch.matmul(patches, weight.T) + state["image_embedder.proj.bias"] + state["pos_embed"]


def _queries_keys_values(state: State, config: Config, attn: str, m: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K (normed per head) and V of one modality, each [B, heads, N, head_dim]."""
    batch, tokens = x.shape[:2]
    qkv = _linear(state, f"{attn}.to_qkv.{m}", x, bias=False)
    qkv = qkv.reshape(batch, tokens, 3, config.heads, config.head_dim).permute(2, 0, 3, 1, 4)
    query = _length_norm(qkv[0], state[f"{attn}.q_rmsnorms.{m}.gamma"])
    key = _length_norm(qkv[1], state[f"{attn}.k_rmsnorms.{m}.gamma"])
    return query, key, qkv[2]


def _attention(state: State, config: Config, attn: str, xs: Sequence[Tensor], visible: Tensor) -> list[Tensor]:
    """Joint attention over the tokens of all the modalities, in order; `visible` [B, N] says which keys are seen."""
    parts = [_queries_keys_values(state, config, attn, m, x) for m, x in enumerate(xs)]
    query, key, value = (torch.cat(same, dim=2) for same in zip(*parts, strict=True))
    scores = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(config.head_dim)
    scores = torch.where(visible[:, None, None, :], scores, torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    mixed = torch.matmul(weights / weights.sum(dim=-1, keepdim=True), value)  # [B, heads, N, head_dim]
    mixed = mixed * visible.any(dim=1)[:, None, None, None]  # without any visible key (a text of pads alone): nothing
    merged = mixed.transpose(1, 2).reshape(mixed.shape[0], mixed.shape[2], -1)
    pieces = torch.split(merged, [x.shape[1] for x in xs], dim=1)
    return [_linear(state, f"{attn}.to_out.{m}", piece, bias=False) for m, piece in enumerate(pieces)]


def _adaptive_norm(state: State, name: str, x: Tensor, c: Tensor) -> Tensor:
    gamma, beta = _modulation(state, f"{name}.to_cond.2", c)
    return _layer_norm(x, 1e-5) * gamma + beta  # open: eps of the second norm of a block; taken as the first's, 1e-5


def _feed_forward(state: State, name: str, x: Tensor) -> Tensor:
    return _linear(state, f"{name}.ff.2", _gelu(_linear(state, f"{name}.ff.0.0", x)))


def _block(
    state: State, config: Config, name: str, xs: Sequence[Tensor], cs: Sequence[Tensor], visible: Tensor
) -> list[Tensor]:
    normed = [_adaptive_norm(state, f"{name}.attn_layernorms.{m}", x, cs[m]) for m, x in enumerate(xs)]
    attended = _attention(state, config, f"{name}.joint_attn", normed, visible)
    outs = []
    for m, x in enumerate(xs):
        gate_attn, gate_ff = _modulation(state, f"{name}.cond_dict.cond_linear_{m}", cs[m])
        x = x + attended[m] * gate_attn
        inner = _adaptive_norm(state, f"{name}.ff_layernorms.{m}", x, cs[m])
        outs.append(x + _feed_forward(state, f"{name}.feedforwards.{m}", inner) * gate_ff)
    return outs


def _stack(
    state: State, config: Config, name: str, depth: int, xs: Sequence[Tensor], cs: Sequence[Tensor], visible: Tensor
) -> list[Tensor]:
    for index in range(depth):
        xs = _block(state, config, f"{name}.blocks.{index}", xs, cs, visible)
    return [_length_norm(x, state[f"{name}.norms.{m}.g"]) for m, x in enumerate(xs)]


def _head(state: State, modality: str, x: Tensor, c: Tensor) -> Tensor:
    shift, scale = _modulation(state, f"{modality}_final_layer.adaLN_modulation.2", c)
    return _linear(state, f"{modality}_final_layer.linear", _layer_norm(x, 1e-6) * scale + shift)


def _unpatch(config: Config, tokens: Tensor) -> Tensor:
    """[B, (R / p)^2, p p C], a token being (patch row, patch column, channel), to [B, C, R, R]."""
    batch, patch, channels = tokens.shape[0], config.patch_size, config.img_channels
    side = config.img_resolution // patch
    cells = tokens.reshape(batch, side, side, patch, patch, channels)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, side * patch, side * patch)


def _log_probabilities(logits: Tensor, time: Tensor) -> Tensor:
    """Log-softmax over the first V entries, the mask entry as it is; the sample's constant is taken from all of them."""
    tokens, mask = logits[..., :-1], logits[..., -1:]
    shifted = tokens - tokens.amax(dim=-1, keepdim=True)
    tokens = shifted - torch.log(torch.exp(shifted).sum(dim=-1, keepdim=True))
    sigma = -torch.log1p(-(1 - 1e-5) * time)
    # open: how exp(sigma) - 1 is evaluated at small t, and t = 0 (there the constant is -inf, the output +inf)
    constant = torch.log(torch.expm1(sigma))
    # open: whether the constant is taken from the mask entry too, which is "left as it is"; here from all the entries
    return torch.cat([tokens, mask], dim=-1) - constant[:, None, None]


def forward(
    state: State, config: Config, text_ids: Tensor, text_time: Tensor, image: Tensor, image_std: Tensor
) -> tuple[Tensor, Tensor]:
    """The noise estimate [B, C, R, R] and the text's log-probabilities [B, L, V + 1], in the dtype of the state."""
    dtype = state["text_embedder.weight"].dtype
    text_time, image, image_std = text_time.to(dtype), image.to(dtype), image_std.to(dtype)
    text, picture = _embed_text(state, text_ids), _embed_image(state, config, image)
    c_text = _time_vector(state, config, "text", text_time)
    c_image = _time_vector(state, config, "image", image_std)
    see_text = text_ids != config.pad_id
    see_image = torch.ones(picture.shape[:2], dtype=torch.bool, device=see_text.device)
    see_all = torch.cat([see_text, see_image], dim=1)
    text, picture = _stack(state, config, "joint_embedding", config.depth, [text, picture], [c_text, c_image], see_all)
    # open: the time vector in the towers; taken as the modality's own, the one of the joint blocks
    (text,) = _stack(state, config, "text_dit", config.text_depth, [text], [c_text], see_text)
    (picture,) = _stack(state, config, "image_dit", config.image_depth, [picture], [c_image], see_image)
    eps = _unpatch(config, _head(state, "image", picture, c_image))
    return eps, _log_probabilities(_head(state, "text", text, c_text), text_time)
