"""Attention over the tokens of all modalities together."""

from megadiff.kernels.joint_attention.reference import joint_attention

__all__ = ["joint_attention"]
