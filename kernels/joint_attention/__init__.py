"""Attention over the tokens of all modalities together."""

from megadiff.kernels.dispatch import dispatched
from megadiff.kernels.joint_attention import reference

__all__ = ["joint_attention"]

joint_attention = dispatched(reference.joint_attention)
