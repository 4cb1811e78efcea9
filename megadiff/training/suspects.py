"""The samples that a step was made of, named for people who look for the one that did harm."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from megadiff.config.layout import Layout
from megadiff.data.reading.loader import Loader
from megadiff.distributed.reduce import gather_objects

MOST_NAMED = 8
"""Of each rank; its log names all."""

log = logging.getLogger(__name__)


def samples_of(loader: Loader, layout: Layout, data_steps: Iterable[int]) -> str:
    """The samples of data steps, rank by rank, as shard/key. Collective.

    They follow from the order of samples, so that nothing has to be kept in ordinary steps.
    """
    named = [(data_step, name) for data_step in data_steps for name in (loader.names(data_step) if layout.speaks else ())]
    for data_step, name in named:
        log.info("data step %d had sample %s", data_step, name)
    ranks = []
    for rank, (first, count) in enumerate(gather_objects(([name for _, name in named[:MOST_NAMED]], len(named)))):
        more = f" and {count - len(first)} more" if count > len(first) else ""
        ranks += [f"rank {rank}: {', '.join(first)}{more}"] if first else []
    return f"samples of {'; '.join(ranks)}"
