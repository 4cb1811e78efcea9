"""The tuner, with a clock of its own, on a kernel that is small enough for Triton's interpreter."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megadiff.kernels import tuning
from megadiff.kernels.toolchain import ROOM
from megadiff.kernels.tuning import Config, Question
from tests.kernels.harness import DEVICE

tuner = pytest.importorskip("megadiff.kernels.tuning.triton")
adaln = pytest.importorskip("megadiff.kernels.gated_adaln.triton")
ROOT = Path(__file__).parents[2]
OPS = {path.parent.name for path in ROOM.glob("*/triton.py")} - {"toolchain", "tuning"}
WIDTH = 16
QUESTION = Question("gated_adaln.forward", f"D{WIDTH}", "float32")
CONFIGS: list[Config] = [{"numbers": numbers, "num_warps": 4} for numbers in (32, 64, 128)]


def case() -> Any:
    return tuner.Case("tiny", partial(adaln._launch_both, 2, 5, WIDTH, False, True, torch.float32))


def clock(times: dict[int, float]) -> Any:
    """Time by the number of rows that a program takes."""
    return lambda launch: times[launch.keywords["ROWS"]]


def test_the_fastest_candidate_wins_if_it_is_worth_it():
    times = {2: 1.0, 4: 0.5, 8: 0.7}
    own, *others = CONFIGS
    assert tuner.fastest(case(), QUESTION, own, others, DEVICE, clock(times)) == CONFIGS[1]
    assert tuner.fastest(case(), QUESTION, own, others, DEVICE, clock({2: 1.0, 4: 0.98, 8: 0.99})) is own


def test_a_candidate_with_other_results_or_without_a_launch_is_refused(monkeypatch):
    def clock(launch):
        if launch.keywords["ROWS"] == 8:
            raise RuntimeError("out of resource: shared memory")
        return 1.0 / launch.keywords["ROWS"]

    own, *others = CONFIGS
    assert tuner.fastest(case(), QUESTION, own, others, DEVICE, clock) == CONFIGS[1]
    results = tuner.results

    def wrong(case, question, config, device):
        launches, found = results(case, question, config, device)
        return launches, [tensor + (config == CONFIGS[1]) for tensor in found]

    monkeypatch.setattr(tuner, "results", wrong)
    assert tuner.fastest(case(), QUESTION, own, others, DEVICE, clock) is own


def test_an_op_s_entries_are_of_this_device_and_only_where_a_candidate_is_worth_it(monkeypatch):
    monkeypatch.setattr(adaln, "cases", lambda: [case(), case()])
    monkeypatch.setattr(adaln, "candidates", lambda kernel, architecture: CONFIGS if kernel == "forward" else [])
    (found,) = tuner.tuned("gated_adaln", DEVICE, clock({256: 9.0, 2: 1.0, 4: 0.9, 8: 0.5}))
    assert (*found[:3], found.config) == (*QUESTION, CONFIGS[2])
    assert found.architecture == tuning.target_of(DEVICE).architecture


def test_launchers_take_what_is_tried_and_say_what_they_asked():
    with tuning.trying(QUESTION.kernel, CONFIGS[1]), tuning.listening() as answers:
        case().launch(DEVICE)
    assert answers[0] == (QUESTION, CONFIGS[1])
    with tuning.listening() as answers:
        case().launch(DEVICE)
    assert answers[0][0] == QUESTION
    assert answers[0][1] not in CONFIGS


def test_a_case_gives_the_same_results_however_often_it_runs():
    (_, first), (_, second) = (tuner.results(case(), QUESTION, config, DEVICE) for config in CONFIGS[:2])
    assert len(first) == 3
    assert tuner.disagreement(second, first) < 1e-6


@pytest.mark.slow
def test_candidates_compile_for_both_architectures():
    """The first and the last of every kernel's, by its usual case."""
    script = """
import json, importlib
from megadiff.kernels import tuning
from megadiff.kernels.toolchain.triton import compile_ahead, DEFAULT_TARGETS, ops, recorded
for op in ops():
    module = importlib.import_module(f"megadiff.kernels.{op}.triton")
    case = next(case for case in module.cases() if case.usual)
    for target in DEFAULT_TARGETS:
        with tuning.listening() as answers:
            recorded(case, target)
        for kernel in dict.fromkeys(question.kernel for question, _ in answers):
            candidates = list(module.candidates(kernel.partition(".")[2], target.architecture))
            for config in (candidates[0], candidates[-1]):
                with tuning.trying(kernel, config):
                    launch = next(l for l in recorded(case, target) if l.kernel.__name__ == kernel.partition(".")[2])
                print(json.dumps([kernel, compile_ahead(launch, kernel, target.architecture)._asdict()]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {(name, report["architecture"]) for name, report in lines}
    assert {architecture for _, architecture in kernels} == {80, 90}
    assert {name.partition(".")[0] for name, _ in kernels} == OPS


@pytest.mark.parametrize("architecture", [80, 90])
def test_every_kernel_has_candidates_of_the_same_kind_as_its_defaults(architecture):
    for op in sorted(OPS):
        module = importlib.import_module(f"megadiff.kernels.{op}.triton")
        with tuning.listening() as answers, tuner.recording(run=False), tuning.assumed(tuning.Target(architecture)):
            for each in itertools.islice(module.cases(), 3):
                each.launch(torch.device("meta"))
        assert answers
        for question, config in answers:
            candidates = list(module.candidates(question.kernel.partition(".")[2], architecture))
            assert len(candidates) > 3
            assert all({*candidate} - {"maxnreg"} >= {*config} - {"num_stages", "maxnreg"} for candidate in candidates)
