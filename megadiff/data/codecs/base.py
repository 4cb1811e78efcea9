"""What every codec offers: one modality's way from a sample's members to its clean state, and back to what people look at.

Reading has three steps, so that each runs where it is cheapest: `load` per sample on a thread of the loader, `stack` per batch
there, and `finish` on the device, where what is stored in few bytes becomes floating-point numbers.
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
"""Members that encoding writes beside or in the place of pictures and captions."""


class Loadable(ABC):
    """What can be read out of samples' members, one array each, and stacked to a batch."""

    @abstractmethod
    def load(self, members: Views, key: int, bucket: Bucket | None = None) -> Array:
        """What `stack` takes. Raises SampleError if it is missing or damaged."""

    @abstractmethod
    def blank(self, bucket: Bucket | None = None) -> Array:
        """What stands for a sample that cannot be loaded."""

    def load_batch(
        self, samples: Sequence[Views], keys: Sequence[int], bucket: Bucket | None = None
    ) -> tuple[Array, dict[int, SampleError]]:
        """`load` and `stack`; samples that cannot be loaded are blank, and their errors are told by place."""
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
"""Media that flags of `megadiff sample` give or that it writes in a form of their own; a codec may have any other."""


class Stored(NamedTuple):
    """A value as the records of samples hold it: an entry of JSON, and files that it names, by the ending of their names."""

    entry: dict[str, Any]
    files: dict[str, bytes]


class Codec(Loadable):
    """One modality's way in and out.

    A subclass is made as (field, space, name): the schema's DataField that names it, the modality's space and its name.

    Attributes:
        medium: what its values are: pictures, texts, cells of a table's column, or a word of a codec's own.
        column: of a table's column its name.
        downscaling: pixels per place of the grid along an edge, of pictures.
    """

    medium: ClassVar[str]
    space: GridSpace | TokenSpace
    column: str | None = None

    @classmethod
    def check_encoded(cls, field: Any, told: Mapping[str, Any], address: str, where: str) -> None:
        """Compare what a manifest says of a member's encoding (`told`) with the field at `where` that reads it.

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
        """(state, where it is known, bool of the state's shape) of a value of which a part is to be filled in.

        Args:
            unknown: what says which part: of pictures a mask or None, of texts how many tokens a blank takes.

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
        """A value to what is written of a sample; `name` is how its files' names begin."""
        return Stored({"value": value} if isinstance(value, int | float) else {"text": str(value)}, {})

    def restored(self, entry: Mapping[str, Any], read: Callable[[str], bytes]) -> Any:
        """The value that an entry of a record stands for; `read` gives the contents of a file by its name."""
        return next(iter(entry.values()))

    def load(self, members: Views, key: int, bucket: Bucket | None = None) -> Array:
        """What `stack` and `finish` make a state of. Raises SampleError as `read`."""
        return self.encode(self.read(members, key)).numpy()

    def blank(self, bucket: Bucket | None = None) -> Array:
        """What stands for a sample that cannot be loaded."""
        if isinstance(self.space, TokenSpace):
            return np.zeros(self.space.length, dtype=np.int64)
        return np.zeros((self.space.channels, self.space.height, self.space.width), dtype=np.float32)

    def finish(self, stacked: Tensor, keys: Tensor) -> Tensor:
        """The clean states of stacked samples, on their device; `keys` int64 [B] decide what is drawn."""
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
    """The arrays of several samples as one, [B, ...], if they are of one type and shape; else, or if any is damaged, None.

    One copy of the bytes, and next to nothing per sample besides: several times faster than `array_of` and stacking.
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


def row_of(members: Views, member: str, number: int) -> list[int] | None:
    """Row `number` modulo the rows of an int32 array; None where it is no such array. For short rows faster than `array_of`."""
    data = _view_of(members, member)
    begins = npy.header_length(data)
    dtype, shape = npy.known_header(bytes(data[:begins])) or (None, ())
    if dtype != _INT32 or len(shape) != 2 or not shape[0] or len(data) - begins != 4 * shape[0] * shape[1]:
        return None
    start = number % shape[0] * shape[1]
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
