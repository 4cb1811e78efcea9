"""S5, S6, S11 and S12, the sampling faults of the paper's released code in requests and outputs: each is impossible here.

Each test fails where its fault is put in. S1 to S4 and S7 to S10: tests/diffusion/test_released_faults.py.
"""

import io
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from megadiff import rng
from megadiff.cli.main import main
from megadiff.config.load import load_run
from megadiff.config.schema import GridSpace, Model, PixelField, Sampling
from megadiff.data.codecs.pictures import PixelCodec
from megadiff.diffusion.sampler import Conditions, Known, Sampler
from megadiff.generation import generate as generating
from megadiff.generation.loading import codecs_of
from megadiff.generation.planner import Planner
from megadiff.generation.request import GenerateRequest
from megadiff.weights.loading import Loaded
from tests.diffusion.ideal import SHARES, IdealDenoiser, cells
from tests.diffusion.probes import COUNT, KEYS, MASK, MODEL, PAIRS, SPREAD, Constant, Watched

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]


def tokens_of(sampling: Sampling, shares: Tensor = SPREAD, count: int = COUNT) -> Tensor:
    return Sampler(MODEL, sampling).sample(Constant(shares), KEYS[:count], generate=["tokens"])["tokens"]


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """What planning and storing need of a model, without a network."""
    monkeypatch.chdir(ROOT)  # tokenizers are named relative to it
    run = load_run(ROOT / "tests/tiny.yaml")
    return Loaded(run.model, run.data, tuple(run.model.modalities), None, "test", "hash", "card")


@pytest.mark.parametrize("prompt", ["a", "cat", "a red heart on a green apple"])
def test_a_repeated_prompt_stands_there_ten_times_and_no_more(untrained, prompt):
    request = GenerateRequest(checkpoint="", task="text-to-image", out="", prompt=(prompt,), repeat_prompt=True)
    codec = codecs_of(untrained)["text"]
    (chunk,) = Planner(request, untrained, codecs_of(untrained)).chunks()
    ids = codec.ids(" ".join([prompt] * 10))  # type: ignore[attr-defined]
    assert len(ids) == 10 or prompt != "a"
    assert chunk.load()[1].given["text"][0].tolist() == [*ids[:15], 1, *[0] * (15 - len(ids))]


@pytest.mark.parametrize("repeat", [False, True])
def test_s5_a_limit_of_the_context_is_the_smaller_of_two_lengths(untrained, repeat):
    """S5: max in place of min makes every limit below the context's 16 tokens do nothing."""

    def text(limit: int | None) -> list[int]:
        request = GenerateRequest(
            checkpoint="",
            task="text-to-image",
            out="",
            prompt=("a red heart on a green apple beside a blue car",),
            limit_context_len=limit,
            repeat_prompt=repeat,
        )
        (chunk,) = Planner(request, untrained, codecs_of(untrained)).chunks()
        return chunk.load()[1].given["text"][0].tolist()

    whole, (end, pad) = text(None), (1, 0)
    length = whole.index(end) + 1
    assert length == 16 if repeat else length > 5
    for limit in (1, 2, 4, length - 1):
        assert text(limit) == [*whole[: limit - 1], end, *[pad] * (16 - limit)]
    for limit in (length, 16, 17, 500):
        assert text(limit) == whole


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
def test_s6_pictures_leave_as_8_bit_numbers_so_that_a_scorers_1_over_255_applies_once(channels, mode):
    """S6: numbers in [0, 1] given to an image processor, which divides by 255, are nearly black."""
    codec = PixelCodec(PixelField(), GridSpace(channels=channels, height=4, width=4))
    for state, value in ((-1.0, 0), (0.5, 191), (1.0, 255), (7.0, 255)):
        picture = codec.decode(torch.full((channels, 4, 4), state))
        assert isinstance(picture, Image.Image)
        assert picture.mode == mode
        pixels = np.asarray(picture)
        assert pixels.dtype == np.uint8
        assert (pixels == value).all()
        buffer = io.BytesIO()
        picture.save(buffer, "png")
        with Image.open(buffer) as stored:
            assert (np.asarray(stored) == value).all()
        assert (pixels / 255).mean() == pytest.approx((min(state, 1.0) + 1) / 2, abs=1 / 255)  # the processor's own rescaling


@pytest.mark.parametrize(
    ("count", "batch", "world"),
    [(1, 4, 1), (8, 4, 1), (5, 2, 1), (8, 4, 3), (6, 2, 2), (7, 3, 2), (2, 1, 3), (9, 3, 4), (12, 5, 3), (3, 32, 2)],
)
def test_s11_exactly_n_samples_whatever_the_batch_and_the_processes(untrained, tmp_path, monkeypatch, count, batch, world):
    """S11: no batch too many, none too few where the world does not divide them; and the pictures are 8-bit (S6)."""
    drawn: list[int] = []
    asked: list[str] = []

    def draw(network: Any, model: Model, sampling: Sampling, task: Any, keys: Tensor, *_: Any, **named: Any) -> Any:
        drawn.extend(keys.tolist())
        return {"text": torch.ones(len(keys), 16, dtype=torch.int64), "image": torch.full((len(keys), 3, 32, 32), 0.5)}

    def load(address: str, weights: str, *_: Any, **named: Any) -> Loaded:
        asked.append(weights)
        return untrained

    monkeypatch.setattr(generating, "load", load)
    monkeypatch.setattr(generating, "draw", draw)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("rank 0 waits for a chunk that nobody has drawn"))
    if world > 1:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "1")
    request = GenerateRequest(checkpoint="", task="joint", out=str(tmp_path / "out"), n=count, batch=batch, weights="raw")
    for rank in reversed(range(world)):  # rank 0 waits for the others, and joins what all have stored
        if world > 1:
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("LOCAL_RANK", str(rank))
        records = generating.generate(request)
    numbers = [json.loads(line)["number"] for line in records.read_text().splitlines()]
    assert numbers == list(range(count))
    assert sorted(drawn) == sorted(rng.sample_keys(0, torch.arange(count)).tolist())  # each once, and nothing for nobody
    pictures = sorted((tmp_path / "out").glob("*.image.png"))
    assert len(pictures) == count
    with Image.open(pictures[0]) as picture:
        assert picture.mode == "RGB"
        assert (np.asarray(picture) == 191).all()
    assert asked == ["raw"] * world


@pytest.mark.parametrize(("flags", "weights"), [([], "ema"), (["--weights", "raw"], "raw"), (["--weights", "ema"], "ema")])
def test_s11_plain_weights_can_be_asked_for(monkeypatch, flags, weights):
    """S11: the released --use_ema could not be turned off."""
    asked: list[GenerateRequest] = []
    monkeypatch.setattr(generating, "generate", asked.append)
    command = ["sample", "--checkpoint", "x", "--task", "text-to-image", "--prompt", "p", "--limit-context-len", "7"]
    assert main([*command, "--out", "y", *flags]) == 0
    assert asked[0].weights == weights
    assert asked[0].limit_context_len == 7  # S5: it arrives


def known(name: str, values: Sequence[float], where: Sequence[bool]) -> Conditions:
    shape = (COUNT, 3) if name == "tokens" else (COUNT, 1, 1, 2)
    clean, places = torch.tensor(values), torch.tensor(where)
    return Conditions(known={name: Known(clean.expand(COUNT, -1).reshape(shape), places.expand(COUNT, -1).reshape(shape))})


def drawn_pairs(conditions: Conditions) -> dict[str, Tensor]:
    made = Sampler(MODEL, Sampling(steps=20, resample=4)).sample(
        IdealDenoiser(MODEL), KEYS, generate=["tokens", "grid"], conditions=conditions
    )
    made["point"] = cells(made["grid"], made["tokens"])
    return made


def test_s12_a_part_of_a_grid_is_filled_in():
    """S12: in-painting. The known column is points 0's and 1's alone."""
    made = drawn_pairs(known("grid", [-1.0, 0.0], [True, False]))
    assert (made["grid"][..., 0] == -1).all()
    assert (made["grid"][..., 1] + 0.6).abs().median() < 0.02
    assert (made["point"] <= 1).double().mean() > 0.75  # of the data: 0.4


@pytest.mark.parametrize(
    ("values", "where", "points"),
    [
        ([3, 0, 0], [True, False, False], {1, 2}),
        ([0, 0, 4], [True, False, True], {3}),
        ([0, 0, 2], [False, False, True], {0, 4}),
    ],
    ids=["prefix", "middle", "suffix"],
)
def test_s12_a_text_is_filled_in_before_after_and_between_what_is_known(values, where, points):
    """S12: infilling and prefixes."""
    made = drawn_pairs(known("tokens", values, where))
    assert (made["tokens"] == torch.tensor(values))[:, torch.tensor(where)].all()
    assert torch.isin(made["point"], torch.tensor(sorted(points))).double().mean() > 0.94
    assert set(made["point"].tolist()) >= points


def test_s12_variations_stay_nearer_the_smaller_their_strength():
    """S12: editing."""
    sampler, same = Sampler(MODEL, Sampling(steps=20)), []
    for strength in (0.1, 0.5, 0.9):
        start = {name: sampler.noised(name, PAIRS[name], strength, KEYS) for name in ("tokens", "grid")}
        conditions, network = Conditions(initial=start, start_at=dict.fromkeys(start, strength)), Watched()
        made = sampler.sample(network, KEYS, generate=["tokens", "grid"], conditions=conditions)
        made["point"] = cells(made["grid"], made["tokens"])
        for clock in network.seen[0][0].clocks.values():
            assert (clock == strength).all()
        # Draws of the data that are noised and denoised again are draws of the data.
        shares = torch.bincount(made["point"], minlength=6).double() / COUNT
        assert (shares[:5] - SHARES).abs().max() < 0.04
        same.append((made["point"] == PAIRS["index"]).double().mean().item())
    assert same[0] > same[1] + 0.05 > same[2] + 0.1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 0.5}, SPREAD**2),
        ({"temperature": 2.0}, SPREAD**0.5),
        ({"temperature": 0.0}, SPREAD * (SPREAD.max() == SPREAD)),
        ({"top_k": 2}, SPREAD * (SPREAD >= 0.3)),
        ({"top_p": 0.8}, SPREAD * (SPREAD >= 0.15)),
        ({"top_p": 0.8, "temperature": 0.5}, SPREAD**2 * (SPREAD >= 0.3)),
    ],
    ids=str,
)
def test_s12_temperature_top_k_and_top_p_shape_what_is_drawn(options, expected):
    """S12: and temperature comes before top-p."""
    expected = expected / expected.sum()
    made = tokens_of(Sampling(steps=3, **options)).flatten()
    shares = torch.bincount(made, minlength=5).double() / len(made)
    assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / len(made)).sqrt()).all(), shares


def test_s12_the_surest_positions_come_first():
    """S12: confidence, entropy and threshold; each position's sureness grows with its place here."""
    shares = torch.stack([torch.tensor([p, *[(1 - p) / 4] * 4], dtype=torch.float64) for p in (0.3, 0.6, 0.99)])
    for order, least in (("entropy", 1.0), ("confidence", 0.95)):
        network = Constant(shares)
        Sampler(MODEL, Sampling(steps=3, order=order)).sample(network, KEYS, generate=["tokens"])
        visible = [(state != MASK).double().mean(0) for state in network.states]
        assert visible[1][2] >= least
        assert visible[2][1] >= least - 0.45 * (order == "confidence")
        assert [int((state != MASK).sum(1).max()) for state in network.states] == [0, 1, 2]
    sure = Constant(shares)
    Sampler(MODEL, Sampling(steps=3, order="threshold", threshold=0.5)).sample(sure, KEYS, generate=["tokens"])
    at_once = (sure.states[1] != MASK).sum(1).double().mean()
    assert at_once == pytest.approx(0.6 + 0.99 + 0.4 * 0.01, abs=0.05)  # the third position, where neither is sure


@pytest.mark.parametrize("remask", ["none", "cap", "conf", "loop"])
def test_s12_visible_tokens_may_be_masked_again(remask):
    """S12: remasking."""
    network = Constant(SPREAD)
    Sampler(MODEL, Sampling(steps=20, remask=remask, remask_strength=0.2)).sample(network, KEYS[:200], generate=["tokens"])
    again = sum(int(((then == MASK) & (now != MASK)).sum()) for now, then in pairwise(network.states))
    assert (again > 50) == (remask != "none")
    assert (again == 0) == (remask == "none")


def test_s12_every_sample_has_its_own_seed_and_its_steps_can_be_watched_and_changed():
    """S12: seeds per sample, streaming, an interface for programs."""
    sampler, told = Sampler(MODEL, Sampling(steps=5)), []
    whole = sampler.sample(IdealDenoiser(MODEL), KEYS[:30], generate=["tokens", "grid"])
    some = torch.tensor([17, 3])

    def watch(step: int, clocks: Mapping[str, Tensor], states: dict[str, Tensor]) -> dict[str, Tensor]:
        told.append((step, round(clocks["grid"][0].item(), 6)))
        return {**states, "grid": states["grid"] * 0} if step == 4 else states

    part = sampler.sample(IdealDenoiser(MODEL), KEYS[some], generate=["tokens", "grid"], after_step=watch)
    assert torch.equal(part["tokens"], whole["tokens"][some])
    assert told == [(0, 0.8), (1, 0.6), (2, 0.4), (3, 0.2), (4, 0.0)]
    assert not part["grid"].any()
    other = sampler.sample(IdealDenoiser(MODEL), rng.fold(KEYS[:30], 1), generate=["tokens", "grid"])
    assert (other["grid"] - whole["grid"]).abs().flatten(1).amax(1).median() > 0.1
    assert not torch.equal(other["tokens"], whole["tokens"])
