"""The fixture of tests/data/packs.py."""

from tests.data.packs import folder

__all__ = ["folder"]
