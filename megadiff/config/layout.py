"""How the ranks of a run are arranged, and which of them this is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Ranks in a box of pipeline stages x data-parallel replicas x tensor-parallel parts, the last running fastest.

    Attributes:
        rank: this one, below `world`.
        world: how many there are; a multiple of pipeline x tensor.
        pipeline: stages that a replica's layers are cut into.
        tensor: ranks that share each layer of a stage.
    """

    rank: int = 0
    world: int = 1
    pipeline: int = 1
    tensor: int = 1

    @property
    def data_ranks(self) -> int:
        """Replicas: how many parts of a global batch are worked on at once."""
        return self.world // (self.pipeline * self.tensor)

    @property
    def data_rank(self) -> int:
        """The replica that this rank is a part of."""
        return self.rank // self.tensor % self.data_ranks

    @property
    def pipeline_rank(self) -> int:
        return self.rank // (self.tensor * self.data_ranks)

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def reads(self) -> bool:
        """Whether this rank takes samples: the first pipeline stage as input, the last one for its losses."""
        return self.pipeline_rank in (0, self.pipeline - 1)

    @property
    def speaks(self) -> bool:
        """Whether this rank reports for its replica: the first tensor part of the last pipeline stage, which has the losses."""
        return self.pipeline_rank == self.pipeline - 1 and self.tensor_rank == 0

    @property
    def leads(self) -> bool:
        """Whether this is the one rank that writes what the whole run has once: logs, records, manifests."""
        return self.data_rank == 0 and self.speaks

    def __str__(self) -> str:
        sizes = (self.pipeline, "pipeline stages"), (self.data_ranks, "replicas"), (self.tensor, "tensor ranks")
        return " x ".join(f"{size} {what}" for size, what in sizes if size > 1) or "1 replica"

    def ranks_of(self, pipeline_rank: int, data_rank: int) -> range:
        """The ranks that share the layers of a replica's pipeline stage."""
        first = (pipeline_rank * self.data_ranks + data_rank) * self.tensor
        return range(first, first + self.tensor)
