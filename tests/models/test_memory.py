"""Memory that is freed and needed again."""

from __future__ import annotations

import resource

import torch

from megadiff.models.memory import keep_freed_memory

CHUNKS, NUMBERS = 8, 2**21


def page_faults_of_filling():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(NUMBERS) for _ in range(CHUNKS)]
    assert len(tensors) == CHUNKS
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_memory_that_was_freed_is_used_again_without_page_faults():
    keep_freed_memory()
    for _ in range(3):  # the heap may grow by what alignment takes
        page_faults_of_filling()
    pages = CHUNKS * NUMBERS * 4 / resource.getpagesize()
    assert page_faults_of_filling() < pages / 20
