"""The layout that a DeepSpeed JSON asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megadiff.config.deepspeed import check, resolve, resolve_run
from megadiff.config.errors import ConfigError
from megadiff.config.layout import Layout
from megadiff.config.layouts import layout_of, sizes, with_sizes
from tests.minimal import ZERO3, minimal_run

ZERO1: dict[str, Any] = {**ZERO3, "zero_optimization": {"stage": 1}}


def fault(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        check(tree)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_ranks_that_no_size_claims_are_data_parallel() -> None:
    assert layout_of(ZERO3, 8, 3) == Layout(3, 8)
    both = with_sizes(ZERO1, pipeline=2, tensor=2)
    assert sizes(both) == (2, 2)
    assert layout_of(both, 8, 5) == Layout(5, 8, pipeline=2, tensor=2)
    assert layout_of(both, 8).data_ranks == 2


def test_a_size_on_the_command_line_wins_and_leaves_the_tree_as_it_was() -> None:
    tree = with_sizes(ZERO1, pipeline=4)
    assert sizes(with_sizes(tree, pipeline=2)) == (2, 1)
    assert sizes(with_sizes(tree, tensor=2)) == (4, 2)
    assert sizes(tree) == (4, 1)


def test_deepspeed_sees_neither_key(tmp_path: Path) -> None:
    resolved = resolve(
        with_sizes(ZERO1, pipeline=2, tensor=2), minimal_run(tmp_path).stages[0], data_ranks=1, accelerator=False
    )
    assert not {"pipeline", "tensor_model_parallel_size", "tensor_parallel"} & set(resolved)


def test_the_batch_is_divided_over_data_ranks_only(tmp_path: Path) -> None:
    run = minimal_run(tmp_path)
    resolved = resolve_run(with_sizes(ZERO1, pipeline=2), run, ranks=8, accelerator=False)
    assert resolved["first"]["gradient_accumulation_steps"] == 1, "16 samples in micro-batches of 4 on 4 data ranks"


def test_ranks_that_do_not_divide_are_refused_with_a_number_that_does(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"6 ranks cannot be 2 .* x 2 tensor ranks: .* 4, such as 8"):
        layout_of(with_sizes(ZERO1, pipeline=2, tensor=2), 6)
    with pytest.raises(ConfigError, match=r"1 rank cannot be 4 .* multiple of 4, such as 4"):
        resolve_run(with_sizes(ZERO1, pipeline=4), minimal_run(tmp_path), ranks=1, accelerator=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pipeline": 2}, "pipeline must be a block"),
        ({"pipeline": {"stages": 0}}, "pipeline.stages is 0; it must be a whole number, 1 or more"),
        ({"pipeline": {"stages": True}}, "pipeline.stages is true"),
        ({"pipeline": {"stages": "auto"}}, 'pipeline.stages is "auto"'),
        ({"pipeline": {"partition": "uniform"}}, "pipeline.partition: only stages may stand there"),
        ({"tensor_model_parallel_size": 1.5}, "tensor_model_parallel_size is 1.5"),
        ({"tensor_parallel": {"autotp_size": 2}}, "write tensor_model_parallel_size: T instead"),
        ({"pipeline": {"stages": 2}, "zero_optimization": {"stage": 3}}, "zero_optimization.stage 3 under a pipeline"),
        (
            {"pipeline": {"stages": 2}, "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer under a pipeline",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(changes: dict[str, Any], said: str) -> None:
    assert said in fault({**ZERO1, **changes})


def test_compiled_blocks_are_refused_under_tensor_parallelism(tmp_path: Path) -> None:
    run = minimal_run(tmp_path, stage_defaults__compile=True)
    resolve_run(with_sizes(ZERO1, pipeline=2), run, ranks=2, accelerator=False)
    with pytest.raises(ConfigError, match="compile is not supported with tensor parallelism"):
        resolve_run(with_sizes(ZERO1, tensor=2), run, ranks=2, accelerator=False)


def test_one_stage_is_no_pipeline_and_goes_with_any_zero() -> None:
    check(with_sizes(ZERO3, pipeline=1, tensor=1))
