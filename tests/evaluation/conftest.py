"""The fixtures of tests/exports.py."""

from tests.exports import exported, tiny

__all__ = ["exported", "tiny"]
