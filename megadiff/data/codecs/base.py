"""The interface of codecs: from a sample's members to a modality's clean state, and back to values that people look at.

Reading has three steps, each where it is cheapest: `load` per sample and `stack` per batch on a thread of the loader, and
`finish` on the device, where compact stored values become floating-point numbers.
Legend: B samples, C channels, H height, W width of a grid, S tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from megadiff.config.errors import UserError
from megadiff.config.schema import GridSpace, TokenSpace
from megadiff.data import npy
from megadiff.data.buckets import Bucket
from megadiff.data.errors import SampleError
from megadiff.data.shards.shard import Views

Array = NDArray[Any]
LATENTS, TOKENS, FEATURES = "latents.npy", "tokens.npy", "features.npy"
"""Members that encoding writes beside or instead of pictures and captions."""


class Loadable(ABC):
    """A reader of one array from each sample's members, and of batches of them."""

    @abstractmethod
    def load(self, members: Views, key: int, bucket: Bucket | None = None) -> Array:
        """A sample's array, for `stack`. Raises SampleError if it is missing or damaged."""

    @abstractmethod
    def blank(self, bucket: Bucket | None = None) -> Array:
        """The array of a sample that cannot be loaded."""

    def load_batch(
        self, samples: Sequence[Views], keys: Sequence[int], bucket: Bucket | None = None
    ) -> tuple[Array, dict[int, SampleError]]:
        """`load` and `stack`; samples that cannot be loaded are blank, and their errors are returned by place in the batch."""
        values: list[Array | None] = []
        errors: dict[int, SampleError] = {}
        for place, (members, key) in enumerate(zip(samples, keys, strict=True)):
            try:
                values.append(self.load(members, key, bucket))
            except SampleError as error:
                values.append(None)
                errors[place] = error
        return self.stack(values, bucket), errors

    def stack(self, values: Sequence[Array | None], bucket: Bucket | None = None) -> Array:
        """Loaded samples to one array [B, ...]; None is a sample that could not be loaded."""
        read = [value for value in values if value is not None]
        blank = np.zeros_like(read[0]) if read else self.blank(bucket)
        return np.stack([blank if value is None else value for value in values])


PICTURE, TEXT, COLUMN = "picture", "text", "column"
"""Media that `megadiff sample` has flags or output formats for; a codec may have any other."""


class Stored(NamedTuple):
    """A value as the records of samples hold it: a JSON entry, and the contents of the files that it names, by name."""

    entry: dict[str, Any]
    files: dict[str, bytes]


class Codec(Loadable):
    """One modality's way in and out.

    A subclass is made as (field, space, name): the schema's DataField that names it, the modality's space and its name.

    Attributes:
        medium: kind of its values: pictures, texts, cells of a table's column, or a word of a codec's own.
        column: name of the table's column, if it reads one.
        downscaling: pixels per place of the grid along an edge, for pictures.
    """

    medium: ClassVar[str]
    space: GridSpace | TokenSpace
    column: str | None = None

    @classmethod
    def check_encoded(cls, field: Any, facts: Mapping[str, Any], address: str, where: str) -> None:
        """Compare the manifest's facts about a member's encoding (`facts`) with the field at `where` that reads it.

        Raises:
            ConfigError: they do not fit.
        """

    @property
    def downscaling(self) -> int:
        return 1

    @abstractmethod
    def read(self, members: Views, key: int) -> Any:
        """The value (a picture, a text) in a sample's members; `key` decides where there are several.

        Raises:
            SampleError: it is missing or damaged.
        """

    @abstractmethod
    def encode(self, value: Any) -> Tensor:
        """A value to a clean state, without the batch axis."""

    def encode_partly(self, value: Any, unknown: Any) -> tuple[Tensor, Tensor]:
        """(state, where it is known as bool of the state's shape) of a value that is to be filled in partly.

        Args:
            unknown: the part to fill in: a mask or None for pictures, the tokens of a blank for texts.

        Raises:
            UserError: values of this medium cannot be filled in, or this one has no room.
        """
        raise UserError(f"a {self.medium} cannot be filled in")

    @abstractmethod
    def decode(self, state: Tensor) -> Any:
        """A state to a value."""

    def shown(self, value: Any) -> Image.Image | str:
        """A value as a sheet shows it: a picture, or a text."""
        return str(value)

    def stored(self, value: Any, name: str) -> Stored:
        """A value as the records hold it; `name` begins the names of its files."""
        return Stored({"value": value} if isinstance(value, int | float) else {"text": str(value)}, {})

    def restored(self, entry: Mapping[str, Any], read: Callable[[str], bytes]) -> Any:
        """The value of a record's entry; `read` gives the contents of a file by its name."""
        return next(iter(entry.values()))

    def load(self, members: Views, key: int, bucket: Bucket | None = None) -> Array:
        """A sample's array, which `stack` and `finish` make a state of. Raises SampleError as `read`."""
        return self.encode(self.read(members, key)).numpy()

    def blank(self, bucket: Bucket | None = None) -> Array:
        """The array of a sample that cannot be loaded."""
        if isinstance(self.space, TokenSpace):
            return np.zeros(self.space.length, dtype=np.int64)
        return np.zeros((self.space.channels, self.space.height, self.space.width), dtype=np.float32)

    def finish(self, stacked: Tensor, keys: Tensor) -> Tensor:
        """The clean states of stacked samples, on their device; `keys` int64 [B] key the draws."""
        return stacked


def member_of(members: Views, member: str) -> bytes:
    """A member's bytes. Raises SampleError if the sample has none of that ending."""
    return bytes(_view_of(members, member))


def _view_of(members: Views, member: str) -> bytes | memoryview:
    if member not in members:
        raise SampleError(f"it has no .{member} member (it has {', '.join(sorted(members)) or 'none'})")
    return members[member]


_INT32 = np.dtype("=i4")


def arrays_of(samples: Sequence[Views], member: str) -> Array | None:
    """The arrays of several samples as one, [B, ...]; None if their types or shapes differ or one is damaged.

    It copies the bytes once, and is several times faster than `array_of` and stacking.
    """
    views = [members.get(member) for members in samples]
    if not views or views[0] is None or len(views[0]) < npy.SHORTEST_HEADER:
        return None
    begins = npy.header_length(views[0])
    header, length = bytes(views[0][:begins]), len(views[0])
    if not all(view is not None and len(view) == length and view[:begins] == header for view in views):
        return None
    try:
        dtype, shape = npy.header_of(header)
        joined = bytearray().join([view[begins:] for view in views if view is not None])
        return np.frombuffer(joined, dtype).reshape(len(views), *shape)
    except ValueError:
        return None


def row_of(members: Views, member: str, number: int, first: int | None = None) -> list[int] | None:
    """Row `number` modulo the rows (the `first` ones) of an int32 array; None for other arrays. For short rows faster than
    `array_of`."""
    data = _view_of(members, member)
    begins = npy.header_length(data)
    dtype, shape = npy.known_header(bytes(data[:begins])) or (None, ())
    if dtype != _INT32 or len(shape) != 2 or not shape[0] or len(data) - begins != 4 * shape[0] * shape[1]:
        return None
    start = number % min(shape[0], first or shape[0]) * shape[1]
    row: list[int] = memoryview(data)[begins:].cast("i")[start : start + shape[1]].tolist()
    return row


def array_of(members: Views, member: str) -> Array:
    """A NumPy array in a member. Raises SampleError if it is missing or damaged."""
    data = _view_of(members, member)
    begins = npy.header_length(data)
    try:
        dtype, shape = npy.header_of(bytes(data[:begins]))
    except ValueError as error:
        raise SampleError(f"its .{member} member is no NumPy array: {error}") from None
    try:
        return np.frombuffer(data, dtype, offset=begins).reshape(shape)
    except ValueError as error:
        raise SampleError(f"its .{member} member is no whole NumPy array: {error}") from None
