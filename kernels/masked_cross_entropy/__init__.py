"""Cross entropy of a vocabulary head at chosen positions only."""

from megadiff.kernels.masked_cross_entropy.reference import masked_cross_entropy, row_logits

__all__ = ["masked_cross_entropy", "row_logits"]
