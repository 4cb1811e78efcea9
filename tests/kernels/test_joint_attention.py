"""Joint attention against a naive loop, and what it promises beside."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megadiff.kernels.joint_attention import joint_attention
from megadiff.kernels.streams import Projected, Span
from tests.kernels.harness import DTYPES, TOLERANCES, assert_agrees, numbers, poison


def random_streams(lengths, visible, heads=2, width=4, batch=3):
    return [
        Projected(
            torch.randn(batch, length, 3, heads, width, dtype=torch.float64), None, None, Span(batch, length, visible=mask)
        )
        for length, mask in zip(lengths, visible)
    ]


def naive_attention(streams):
    """Token by token, over lists of the tokens that there are."""
    queries, keys = zip(*(naive_tokens(stream) for stream in streams), strict=True)
    outputs = [torch.zeros_like(stream.qkv[..., 0, :, :]).flatten(0, -3) for stream in streams]
    shapes = [stream.qkv[..., 0, :, :].shape for stream in streams]
    for sample in range(streams[0].span.batch):
        seen = [pair for of_stream in keys for pair in of_stream[sample]]
        for index, of_stream in enumerate(queries):
            for row, query in of_stream[sample]:
                heads = []
                for head, vector in enumerate(query):
                    weights = [torch.exp(vector @ key[head] / math.sqrt(len(vector))) for key, _ in seen]
                    mixed = sum((weight * value[head] for weight, (_, value) in zip(weights, seen, strict=True)), 0 * vector)
                    heads.append(mixed / sum(weights) if weights else mixed)
                outputs[index] = outputs[index].index_copy(0, torch.tensor([row]), torch.stack(heads)[None])
    return [output.view(shape) for output, shape in zip(outputs, shapes, strict=True)]


def naive_tokens(stream):
    """By sample the (row, query) of every token, and the (key, value) of those that may be seen."""
    span, flat = stream.span, stream.qkv.flatten(0, -4)
    queries, keys = [], []
    for sample in range(span.batch):
        first = sample * span.longest if span.starts is None else int(span.starts[sample])
        count = span.longest if span.lengths is None else int(span.lengths[sample])
        queries.append([])
        keys.append([])
        for place in range(count):
            query, key, value = flat[first + place]
            if stream.gains is not None:
                query, key = (
                    vectors / vectors.norm(dim=-1, keepdim=True) * math.sqrt(vectors.shape[-1]) * gains
                    for vectors, gains in zip((query, key), stream.gains, strict=True)
                )
            if stream.rotary is not None:
                query, key = (naive_turn(vectors, *stream.rotary[:, place, 0]) for vectors in (query, key))
            queries[-1].append((first + place, query))
            if span.visible is None or span.visible[sample, place]:
                keys[-1].append((key, value))
    return queries, keys


def naive_turn(vectors, cosine, sine):
    turned = torch.complex(*vectors.chunk(2, dim=-1)) * torch.complex(cosine, sine)
    return torch.cat([turned.real, turned.imag], dim=-1)


def layout(kind, length, batch=3):
    """(span, rows of qkv that are no token) of three samples; of the ragged ones the second has no token."""
    lengths = torch.tensor([min(2, length), 0, length], dtype=torch.int32)
    nobody = torch.zeros(batch, length, dtype=torch.bool)
    match kind:
        case "dense":
            return Span(batch, length), nobody
        case "hidden":
            visible = torch.rand(batch, length) < 0.5
            visible[:, 0] = True
            return Span(batch, length, visible=visible), nobody
        case "ragged":
            return Span(batch, length, lengths=lengths), torch.arange(length) >= lengths[:, None]
        case "packed":
            starts = (lengths.cumsum(0) - lengths).int()
            return Span(batch, length, starts, lengths), torch.zeros(int(lengths.sum()), dtype=torch.bool)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    "kinds",
    [
        {"dense": 3, "hidden": 5},
        {"dense": 4},
        {"hidden": 1, "dense": 2, "ragged": 3},
        {"dense": 5, "ragged": 4},
        {"dense": 1, "packed": 7},
    ],
    ids=str,
)
def test_joint_attention_and_its_gradients_are_those_of_a_naive_loop(kinds, normed, turned, dtype):
    heads, width = 2, 6
    streams = []
    for kind, length in kinds.items():
        span, nobody = layout(kind, length)
        gains = (1 + 0.3 * torch.randn(2, heads, width)).to(dtype).requires_grad_() if normed else None
        angles = torch.rand(length + 1, 1, width // 2) * 3
        rotary = torch.stack([angles.cos(), angles.sin()]) if turned else None
        streams.append(Projected(poison(numbers(*nobody.shape, 3, heads, width, dtype=dtype), nobody), gains, rotary, span))
    inside_float32 = normed or turned
    tolerance = max(TOLERANCES[dtype], TOLERANCES[torch.float32] if inside_float32 else 0)
    assert_agrees(joint_attention, naive_attention, streams, tolerance=tolerance)


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_that_are_not_there_are_neither_seen_nor_computed(packed):
    lengths = torch.tensor([2, 0, 4], dtype=torch.int32)
    there = torch.arange(4) < lengths[:, None]
    picture, words = random_streams((5, 4), (None, None))
    expected = joint_attention([picture, words._replace(span=Span(3, 4, visible=there))])
    span = Span(3, 4, torch.tensor([0, 2, 2], dtype=torch.int32) if packed else None, lengths)
    found = joint_attention([picture, Projected(words.qkv[there] if packed else words.qkv, None, None, span)])
    assert torch.allclose(found[0], expected[0])
    assert torch.allclose(found[1] if packed else found[1][there], expected[1][there])
    assert packed or not found[1][~there].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_sample_whose_keys_are_all_hidden_attends_to_nothing(dtype):
    visible = torch.ones(3, 5, dtype=torch.bool)
    visible[1] = False
    (words,) = random_streams((5,), (visible,))
    words = words._replace(qkv=words.qkv.to(dtype).requires_grad_())
    (attended,) = joint_attention([words])
    attended.square().sum().backward()
    assert not attended[1].any()
    assert not words.qkv.grad[1].any()
    assert attended[[0, 2]].all()
    assert words.qkv.grad.isfinite().all()


def test_no_mask_exists_when_everything_is_visible():
    streams = [stream._replace(qkv=stream.qkv.float()) for stream in random_streams((3, 5), (None, None))]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        joint_attention(streams)


def test_bfloat16_attention_answers_in_bfloat16():
    streams = [stream._replace(qkv=stream.qkv.bfloat16()) for stream in random_streams((3, 5), (None, None))]
    assert {output.dtype for output in joint_attention(streams)} == {torch.bfloat16}
