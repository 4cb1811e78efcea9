"""One of the ranks that hold a head's parts: its losses and gradients against the whole head's; run by tests.ranks."""

from __future__ import annotations

import functools
import json

import torch
import torch.distributed as dist

from megadiff.kernels.agreement import outcome, relative_error
from megadiff.kernels.head_loss import op, reference

VOCABULARY, WIDTH, LENGTH, NORMALISER = 46, 24, 15, 0.3


def errors() -> dict[str, float]:
    """Relative errors of this rank's parts, in float32, after the hidden states' gradients are added up."""
    rank, own = dist.get_rank(), VOCABULARY // dist.get_world_size()
    torch.manual_seed(0)
    hidden = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64).requires_grad_()
    weight, bias = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64), torch.randn(VOCABULARY, dtype=torch.float64)
    rest = torch.randint(VOCABULARY, (2, LENGTH)), torch.rand(2, LENGTH) < 0.7, torch.rand(2, LENGTH)
    whole = outcome(reference.head_loss, (hidden, weight.requires_grad_(), bias.requires_grad_(), *rest), arriving=NORMALISER)
    part = slice(rank * own, (rank + 1) * own)
    heads = [tensor.detach()[part].float().requires_grad_() for tensor in (weight, bias)]
    shard = reference.Shard(part.start, dist.group.WORLD)
    run = functools.partial(op.head_loss, shard=shard)
    found = outcome(run, (hidden.float(), *heads, *rest), arriving=NORMALISER)
    dist.all_reduce(found.gradients[0])
    expected = [*whole.outputs, whole.gradients[0], *(gradient[part] for gradient in whole.gradients[1:])]
    names = "weighted", "unweighted", "hidden", "weight", "bias"
    pairs = zip(names, [*found.outputs, *found.gradients], expected, strict=True)
    return {name: relative_error(one, other) for name, one, other in pairs}


if __name__ == "__main__":
    op.ROWS_AT_ONCE = 8
    dist.init_process_group("gloo")
    print(json.dumps(errors()))
    dist.destroy_process_group()
