"""Weighted cross entropy of a vocabulary head at chosen positions only."""

from megadiff.kernels.dispatch import dispatched
from megadiff.kernels.head_loss import reference

__all__ = ["head_loss"]

head_loss = dispatched(reference.head_loss)
