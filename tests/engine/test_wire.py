"""Layers cut into sections give what the whole model gives, with every gradient, over one float tensor a cut."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megadiff.config.schema import Alignment, Model
from megadiff.engine.section import Section
from megadiff.engine.wire import Wire, dense, pack, tie, unpack
from megadiff.models.mmdit import MMDiT, build_model
from megadiff.models.names import part_of
from megadiff.types import ALIGNMENT, Aligned, Dense, LossTerms, Noised, Prediction, Ragged, TokenLosses
from tests.models.small import small_config, small_noised

LENGTHS = [2, 5, 1]
RULE = Alignment(modality="picture", block=0, features=7)


def unequal_widths() -> Model:
    tree = small_config(trunk_norm=True).model_dump()
    tree["modalities"]["picture"]["width"] = 20
    return Model.model_validate(tree)


CONFIG = unequal_widths()
WIDTHS = {name: CONFIG.width_of(name) for name in CONFIG.modalities}


def model_of(freeze: tuple[str, ...] = (), rule: Alignment | None = RULE) -> MMDiT:
    torch.manual_seed(0)
    model = build_model(CONFIG, ["words", "picture"], rule)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
            parameter.requires_grad_(part_of(name) not in freeze)
    return model


def masked() -> Noised:
    return small_noised()


def ragged() -> Noised:
    noised = small_noised()
    lengths = Ragged(torch.tensor(LENGTHS, dtype=torch.int32), sum(LENGTHS), max(LENGTHS))
    return noised._replace(visible=dict.fromkeys(noised.states), ragged={"words": lengths})


def readout_of(rule: Alignment | None) -> dict[str, Any]:
    # Positions beyond a length are not scored.
    there = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    readout: dict[str, Any] = {"words": TokenLosses(torch.randint(11, (3, 5)), there, torch.rand(3, 5)), "picture": Dense()}
    return readout if rule is None else {**readout, ALIGNMENT: Aligned(torch.randn(3, 6, 7))}


def total_of(prediction: Prediction) -> Tensor:
    parts = [prediction["words"].weighted, prediction["picture"], *([prediction[ALIGNMENT]] if ALIGNMENT in prediction else [])]
    return torch.stack([part.square().mean() for part in parts]).sum()


def gradients(model: MMDiT) -> dict[str, Tensor | None]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def train_in_sections(model: MMDiT, bounds: list[int], noised: Noised, readout: dict[str, Any]) -> list[Tensor]:
    """As DeepSpeed trains: what crosses a cut is copied, and every float that is received must get a gradient.

    Returns:
        The gradient of the floats at each cut.
    """
    micro_batch = SimpleNamespace(noised=noised, readout=readout)
    sections = [Section(model, start, stop, widths=WIDTHS, read=list(readout)) for start, stop in pairwise(bounds)]
    unused = SimpleNamespace()  # whoever looks into another micro-batch fails

    def score(prediction: Prediction, prepared: Any) -> LossTerms:
        return LossTerms(total_of(prediction), {}, {}, {}, {}, {})

    crossing: list[tuple[Tensor, Tensor]] = []
    taken: Any = torch.tensor(1)
    for section in sections:
        section.feed([unused, micro_batch] if section.first or section.last else [], score)  # type: ignore[list-item]
        given = section.train(taken)
        if isinstance(given, Tensor):
            break
        assert isinstance(given, Wire)
        assert given.floats.requires_grad
        received = given.floats.detach().clone().requires_grad_()
        crossing.append((given.floats, received))
        taken = (received.clone(), given.visible, given.header)
    assert len(sections[-1].terms) == 1
    given.backward()
    for floats, received in reversed(crossing):
        assert received.grad is not None
        floats.backward(received.grad)
    return [received.grad for _, received in crossing]  # type: ignore[misc]


def cuts(model: MMDiT) -> list[list[int]]:
    """Cuts into 1 to all layers."""
    count = len(model.layers())
    return [[0, count], [0, count // 2, count], [0, 1, count - 1, count], list(range(count + 1))]


@pytest.mark.parametrize("freeze", [(), ("joint",), ("words", "picture", ALIGNMENT), ("joint", "words")])
@pytest.mark.parametrize(
    ("input_of", "rule", "recompute"),
    [(masked, RULE, False), (masked, None, True), (ragged, RULE, True), (ragged, None, False)],
)
def test_a_cut_model_has_every_gradient_of_the_whole_one(input_of, freeze, rule, recompute):
    model, noised, readout = model_of(freeze, rule), input_of(), readout_of(rule)
    total_of(model(noised, readout)).backward()
    expected = gradients(model)
    model.activation_checkpointing = recompute
    for bounds in cuts(model):
        train_in_sections(model, bounds, noised, readout)
        for name, gradient in gradients(model).items():
            if expected[name] is None:
                assert gradient is None or not gradient.any(), (bounds, name)
            else:
                torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=f"{bounds}: {name}")


def test_no_backward_pass_runs_through_layers_before_all_that_is_trained():
    model, noised, readout = model_of(("joint", ALIGNMENT)), masked(), readout_of(RULE)
    towers = model.layers().index(model.towers["words"][0])
    crossed = train_in_sections(model, list(range(len(model.layers()) + 1)), noised, readout)
    for place, gradient in enumerate(crossed, start=1):
        assert bool(gradient.any()) == (place > towers), place


def test_layers_that_lead_to_nothing_read_are_not_run():
    model = model_of()
    section = Section(model, 1, len(model.layers()) - 1, widths=WIDTHS, read=["picture"])
    model.towers["words"][0].register_forward_hook(lambda *_: pytest.fail("the tower of words was run"))
    stream = model.embed(masked())
    assert section.run(stream, ["picture"]).tapped is None
    assert section.run(stream, ["picture", ALIGNMENT]).tapped is not None


# -------------------------------------------------------------------------------------------------------------- wire


@pytest.mark.parametrize("tapped", [None, torch.randn(3, 6, 7)])
def test_a_stream_comes_back_as_it_was(tapped):
    stream = model_of().embed(masked())._replace(tapped=tapped)
    wire = pack(stream, 4)
    again, number = unpack(wire, WIDTHS)
    assert number == 4
    assert wire.floats.numel() == sum(tensor.numel() for tensor in (*stream.tokens.values(), *stream.conditioning.values())) + (
        0 if tapped is None else tapped.numel()
    )
    for field in ("tokens", "conditioning"):
        for name, tensor in getattr(stream, field).items():
            assert torch.equal(getattr(again, field)[name], tensor)
            assert getattr(again, field)[name].is_contiguous()
    assert torch.equal(again.visible["words"], stream.visible["words"])
    assert again.visible["picture"] is None
    assert again.grids == stream.grids
    assert list(again.tokens) == list(stream.tokens)
    assert (again.tapped is None) == (tapped is None)
    assert tapped is None or torch.equal(again.tapped, tapped)


def test_one_float_tensor_travels_and_it_is_the_first():
    assert [tensor.is_floating_point() for tensor in pack(model_of().embed(masked()), 0)] == [True, False, False]


def test_absent_positions_are_hidden_besides_those_that_already_were():
    noised = ragged()
    assert dense(noised).visible["words"].sum(1).tolist() == LENGTHS
    assert dense(noised).visible["picture"] is None
    assert not dense(noised).ragged
    both = noised._replace(visible={"words": torch.arange(5).expand(3, 5) > 0, "picture": None})
    assert dense(both).visible["words"].sum(1).tolist() == [length - 1 for length in LENGTHS]
    assert not model_of().embed(dense(noised)).rows


def test_a_tied_value_gives_zeros_to_what_it_does_not_depend_on():
    value, floats = torch.tensor([2.0], requires_grad=True), torch.full((3,), math.nan, requires_grad=True)
    tied = tie(value * 3, floats)
    tied.sum().backward()
    assert tied.item() == 6.0
    assert value.grad.item() == 3.0
    assert floats.grad.tolist() == [0.0, 0.0, 0.0]
