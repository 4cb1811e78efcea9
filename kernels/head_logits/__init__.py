"""Logits of a vocabulary head at chosen positions only."""

from megadiff.kernels.dispatch import dispatched
from megadiff.kernels.head_logits import reference

__all__ = ["head_logits"]

head_logits = dispatched(reference.head_logits)
