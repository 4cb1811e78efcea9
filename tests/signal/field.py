"""The field of another medium: 1-D signals. All that the configuration needs, without torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from megadiff.config.schema import DataField, GridSpace, Space


class SignalField(DataField):
    """A signal of so many samples, a NumPy array [T] in a member; a grid of one row."""

    CODEC: ClassVar = "tests.signal.codec:SignalCodec"
    kind: Literal["tests.signal.field:SignalField"] = "tests.signal.field:SignalField"
    member: str = "signal.npy"
    gain: float = 1.0

    def misfit(self, space: Space) -> str:
        if isinstance(space, GridSpace) and (space.channels, space.height) == (1, 1):
            return ""
        return "a signal, which fills a grid of 1 channel and 1 row"
