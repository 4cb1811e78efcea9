"""Memory that is freed and needed again."""

from __future__ import annotations

import resource

import pytest
import torch

from megadiff.models.memory import keep_freed_memory


def page_faults_of_filling(chunks, numbers):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(numbers) for _ in range(chunks)]
    assert len(tensors) == chunks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.parametrize(("chunks", "numbers"), [(8, 2**21), (2, 2**24)], ids=["activations", "flat gradients"])
def test_memory_that_was_freed_is_used_again_without_page_faults(chunks, numbers):
    keep_freed_memory()
    for _ in range(3):  # the heap may grow by what alignment takes
        page_faults_of_filling(chunks, numbers)
    pages = chunks * numbers * 4 / resource.getpagesize()
    assert page_faults_of_filling(chunks, numbers) < pages / 20
