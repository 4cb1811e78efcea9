"""One of the ranks that hold a head's parts: its draws against the whole head's; run by tests.ranks."""

from __future__ import annotations

import json
import math

import torch
import torch.distributed as dist

from megadiff import rng
from megadiff.kernels.head_draw import head_draw_sharded, reference
from megadiff.kernels.head_loss.reference import Shard
from megadiff.types import DrawRule, RowKeys, TokenDraws

WIDTH, COUNT = 24, 300
OWN = 150
"""Tokens of a rank: no multiple of a tile, so that ranks share tiles."""
RULES = [
    DrawRule(),
    DrawRule(temperature=0.7),
    DrawRule(temperature=0.0),
    DrawRule(temperature=1.3, top_k=200),
    DrawRule(top_p=0.8),
    DrawRule(temperature=1.3, top_k=40, top_p=0.9, min_p=0.05),
]


def differences(rule: DrawRule, count: int) -> dict[str, float]:
    """The share of other ids, and the largest difference of each figure."""
    vocabulary = OWN * dist.get_world_size()
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, COUNT, WIDTH), torch.randn(vocabulary, WIDTH) / 2
    bias = torch.randn(vocabulary)
    bias[128:256] = -math.inf  # a tile that both of the first ranks have a part of
    places = torch.arange(count)
    rows, weights = places + torch.tensor([[0], [COUNT]]), torch.tensor([[2.0], [-1.0]]).expand(2, count)
    keys = RowKeys(rng.sample_keys(1, places // 10), "token", places % 10)
    part = slice(dist.get_rank() * OWN, (dist.get_rank() + 1) * OWN)
    rest = rows, weights, keys, rule
    found = head_draw_sharded(hidden, weight[part], bias[part], *rest, Shard(part.start, dist.group.WORLD))
    wanted = reference.head_draw(hidden, weight, bias, *rest)
    pairs = zip(TokenDraws._fields[1:], found[1:], wanted[1:], strict=True)
    figures = {name: (one - other).abs().max().item() if count else float(len(one)) for name, one, other in pairs}
    return {"ids": (found.ids != wanted.ids).double().sum().item(), **figures}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    print(json.dumps([differences(rule, COUNT) for rule in RULES] + [differences(RULES[0], 0)]))
    dist.destroy_process_group()
