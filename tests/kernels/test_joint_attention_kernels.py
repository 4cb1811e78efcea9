"""Joint attention's kernels against the reference: outputs and every gradient, over poisoned memory."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
import torch.nn.functional as F

from megadiff.kernels import dispatch, tuning
from megadiff.kernels.joint_attention import joint_attention, op, path, reference, triton
from megadiff.kernels.qk_norm_pack import op as packing
from megadiff.kernels.streams import Projected, Span
from tests.kernels.harness import DEVICE, KERNEL_DTYPES, RELATIVE_ERRORS, assert_equals_reference, poison

PICTURE, TEXT, SAMPLES, HEADS = 37, 19, 3, 1
LENGTHS = (1, 0, TEXT)


def text_span(kind: str) -> Span:
    """Of three samples' text; in the last layout the first sample's is hidden, as are some positions of the others."""
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    starts = (lengths.cumsum(0) - lengths).int()
    visible = torch.rand(SAMPLES, TEXT) < 0.5
    visible[0] = False
    return {
        "dense": Span(SAMPLES, TEXT),
        "ragged": Span(SAMPLES, TEXT, lengths=lengths),
        "packed": Span(SAMPLES, TEXT, starts, lengths),
        "hidden": Span(SAMPLES, TEXT, visible=visible.to(DEVICE)),
    }[kind]


def projected(shape: tuple[int, ...], span: Span, channels: int, dtype: torch.dtype, heads: int = HEADS) -> Projected:
    qkv = torch.randn(*shape, 3, heads, channels).to(DEVICE, dtype).requires_grad_()
    gains = (1 + 0.3 * torch.randn(2, heads, channels)).to(DEVICE).requires_grad_()
    return Projected(qkv, gains, None, span)


def picture(channels: int = 64, dtype: torch.dtype = torch.float32, samples: int = SAMPLES) -> Projected:
    return projected((samples, PICTURE), Span(samples, PICTURE), channels, dtype)


def text(kind: str, channels: int = 64, dtype: torch.dtype = torch.float32, heads: int = HEADS) -> Projected:
    """Rows without a token are NaN."""
    span = text_span(kind)
    stream = projected((sum(LENGTHS),) if kind == "packed" else (SAMPLES, TEXT), span, channels, dtype, heads)
    if kind == "ragged":
        poison(stream.qkv, torch.arange(TEXT, device=DEVICE) >= span.lengths[:, None])
    return stream


def rotated(stream: Projected) -> Projected:
    angles = 3 * torch.rand(stream.span.longest + 1, 1, stream.qkv.shape[-1] // 2)
    return stream._replace(rotary=torch.stack([angles.cos(), angles.sin()]).to(DEVICE))


def assert_right(*streams: Projected) -> None:
    dtype = streams[0].qkv.dtype
    assert op.refusal("joint_attention", streams) is None
    assert_equals_reference(op.joint_attention, reference.joint_attention, streams, limit=RELATIVE_ERRORS[dtype])


@pytest.mark.parametrize(("kind", "channels"), [("packed", 64), ("hidden", 128)])
def test_two_streams_equal_the_reference(kind, channels):
    assert_right(picture(channels), text(kind, channels))


def test_a_tower_s_single_stream_in_16_bits_equals_the_reference():
    assert_right(text("ragged", dtype=torch.float16, heads=2))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("channels", [16, 32, 64, 128])
@pytest.mark.parametrize("kind", ["dense", "ragged", "packed", "hidden"])
def test_every_layout_width_and_dtype_equals_the_reference(kind, channels, dtype):
    assert_right(picture(channels, dtype), text(kind, channels, dtype))
    assert_right(text(kind, channels, dtype, heads=2), projected((SAMPLES, 70), Span(SAMPLES, 70), channels, dtype, heads=2))


@pytest.mark.slow
def test_loads_by_pointers_equal_the_reference(monkeypatch):
    """What GPUs before Hopper run; the other tests load by TMA's descriptors where Hopper does."""
    without = {key: {0: {**defaults[0], "tma": 0}} for key, defaults in triton.DEFAULTS.items()}
    monkeypatch.setattr(triton, "DEFAULTS", without)
    with tuning.assumed(tuning.Target(0)):
        assert_right(picture(), text("ragged"))


def test_a_packed_stream_without_rows_has_empty_results():
    nothing = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    words, alone = projected((0,), Span(1, TEXT, nothing, nothing), 64, torch.float32), picture(samples=1)
    outputs = op.joint_attention([alone, words])
    assert outputs[1].shape == (0, HEADS, 64)
    gradients = torch.autograd.grad([output.sum() for output in outputs], [words.qkv, words.gains, alone.qkv])
    assert gradients[0].shape == words.qkv.shape
    assert not gradients[1].any()
    (expected,) = op.joint_attention([alone])
    assert torch.equal(outputs[0], expected)


def test_equal_inputs_give_equal_bits():
    streams = [picture(samples=1)]
    first, second = (
        torch.autograd.grad(op.joint_attention(streams)[0].square().sum(), [streams[0].qkv, streams[0].gains]) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_operators_keep_torch_s_rules():
    """Schema, shapes without a run, autograd's registration, and tracing (torch.library.opcheck)."""
    length = torch.tensor([3], dtype=torch.int32, device=DEVICE)
    qkv, gains, _, _ = projected((PICTURE,), Span(1, PICTURE, lengths=length), 64, torch.float32)
    arguments = ([qkv], [gains], [None], [length], [None], [PICTURE], 1)
    torch.library.opcheck(op._forward, arguments)
    attended = [tensor.detach() for tensor in op._forward(*arguments)]
    torch.library.opcheck(op._backward, ([attended[0]], attended, [qkv.detach()], [gains.detach()], *arguments[2:]))


def test_what_calls_it_compiles_whole_and_recomputes_its_activations(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    monkeypatch.setattr(dispatch, "_TWINS", {})
    dispatch.settle()

    def block(qkv: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
        (out,) = joint_attention([Projected(qkv * 2, gains, None, Span(1, PICTURE))])
        return out + 1

    def checkpointed(qkv: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(block, qkv, gains, use_reentrant=False)

    stream = picture(samples=1)
    leaves = [stream.qkv, stream.gains]
    expected = torch.autograd.grad(block(*leaves).square().sum(), leaves)
    for run in (torch.compile(block, fullgraph=True, backend="aot_eager"), checkpointed):
        for one, other in zip(torch.autograd.grad(run(*leaves).square().sum(), leaves), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_under_autocast_it_runs_in_autocast_s_dtype():
    stream = picture(samples=1)
    with torch.autocast(DEVICE.type, torch.float16):
        (out,) = op.joint_attention([stream])
    assert out.dtype == torch.float16
    assert torch.autograd.grad(out.sum(), stream.qkv)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gains": None}, "have no norm"),
        ({"qkv": torch.zeros(1, 2, 3, 1, 48, device=DEVICE)}, "48 channels"),
        ({"qkv": torch.zeros(1, 2, 3, 1, 64, device=DEVICE, dtype=torch.float64)}, "no kernels for torch.float64"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_with_a_reason(change, reason):
    assert reason in op.refusal("joint_attention", [picture()._replace(**change)])


@pytest.mark.parametrize(
    ("streams", "why"),
    [
        ([rotated(picture()), text("packed")], "positions are rotary"),
        ([picture(), text("ragged"), text("hidden")], "there are 3 modalities, the kernel takes 2"),
    ],
    ids=["rotary", "three"],
)
def test_what_is_packed_for_sdpa_equals_the_reference(streams, why):
    assert why in op._packing(streams)
    assert_right(*streams)


def one_by_one(query, key, value, firsts, _, longest, __):
    """What torch's varlen_attn does, sample by sample; NaN behind the last token."""
    ends = firsts.tolist()
    assert max(end - first for first, end in itertools.pairwise(ends)) <= longest
    parts = []
    for first, end in itertools.pairwise(ends):
        operands = [operand[first:end].transpose(0, 1) for operand in (query, key, value)]
        parts.append(F.scaled_dot_product_attention(*operands).transpose(0, 1))
    return torch.cat([*parts, query.new_full((len(query) - ends[-1], *query.shape[1:]), torch.nan)])


@pytest.mark.parametrize("kind", ["packed", "ragged"])
def test_ragged_text_that_is_packed_goes_to_flash_attention_without_its_padding(kind, monkeypatch, caplog):
    monkeypatch.setattr(op, "_varlen_kernel", lambda streams: one_by_one)
    monkeypatch.setattr(dispatch, "_LOGGED", set())
    with caplog.at_level(logging.INFO):
        assert_right(rotated(picture()), text(kind))
    assert "then flash attention of the tokens that exist runs (positions are rotary)" in caplog.text


def test_varlen_attention_is_for_gpus_16_bits_and_texts_without_hidden_positions():
    assert op._varlen_kernel([picture(), text("packed")]) is None


def test_long_samples_are_packed():
    most = path.DEFAULTS[0]["most_places"]
    stream = projected((1, most + 1), Span(1, most + 1), 64, torch.float16)
    assert "samples have up to 1101 tokens, above 1100" in op._packing([stream])
    with tuning.trying(path.QUESTION, {"most_places": 1101}):
        assert op._packing([stream]) is None


def test_the_path_is_measured_up_to_the_first_length_at_which_packing_is_faster(monkeypatch):
    monkeypatch.setattr(path, "_streams", lambda length, channels, device: length)
    monkeypatch.setattr(path, "_step", lambda attention, length: (attention is path._packed, length))

    def seconds(step):
        packed, length = step
        return 5.0 if packed else length / 250

    found = {question.bucket: config for question, config in path.measured(op._attended, DEVICE, seconds)}
    assert found == {"d64": {"most_places": 1144}, "d128": {"most_places": 1144}}


def test_packing_keeps_torch_s_rules():
    qkv, gains, table, _ = rotated(projected((5,), Span(1, 5), 64, torch.float32))
    none = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for firsts, length, shape in ((None, none + 3, (1, 5)), (none, none + 5, (5,))):
        arguments = ([qkv], [gains], [table], [None], [length], [5], 1, firsts)
        torch.library.opcheck(packing._forward, arguments)
        douts = [torch.randn(*shape, HEADS, 64, device=DEVICE) for _ in range(3)]
        torch.library.opcheck(packing._backward, (douts, [qkv.detach()], [gains.detach()], *arguments[2:]))
