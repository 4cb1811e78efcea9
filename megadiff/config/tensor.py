"""The numbers of tensor-parallel ranks that a model can be split over. Torch-free."""

from __future__ import annotations

import math

from megadiff.config.parameters import mlp_hidden
from megadiff.config.schema import Model, TokenSpace


def refusals(model: Model, tensor: int) -> list[str]:
    """A sentence per size of the model that does not divide by `tensor` ranks, with the nearest numbers that divide all."""
    sizes = split_sizes(model)
    common = math.gcd(*sizes.values())
    works = [ranks for ranks in range(1, common + 1) if common % ranks == 0]
    nearest = [*[ranks for ranks in works if ranks < tensor][-1:], *[ranks for ranks in works if ranks > tensor][:1]]
    return [
        f"{what} ({size}) must be a multiple of the tensor-parallel ranks ({tensor}); "
        f"numbers of ranks that fit the model: {' or '.join(map(str, nearest))}"
        for what, size in sizes.items()
        if size % tensor
    ]


def split_sizes(model: Model) -> dict[str, int]:
    """The sizes that tensor parallelism splits evenly, by what they are."""
    sizes = {"model.heads": model.heads}
    for name, modality in model.modalities.items():
        sizes[f"the width of {name}"] = model.width_of(name)
        sizes[f"the hidden width of {name}'s MLPs"] = mlp_hidden(model, name)
        if isinstance(modality.space, TokenSpace):
            sizes[f"the vocabulary of {name}"] = modality.space.vocabulary
    return sizes
