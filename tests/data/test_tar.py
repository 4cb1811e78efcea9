"""The index of a tar is the one that tarfile finds, whatever wrote it; damage is found wherever it is."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadiff.data.errors import DataError
from megadiff.data.shards import tar
from megadiff.data.shards.shard import Shard
from megadiff.data.shards.tar import Member, index, members_of

NAMES = st.text("abcé/.", min_size=1, max_size=160).filter(lambda name: name.strip("/.") and not name.endswith("/"))
CONTENTS = st.binary(max_size=1200)


def written(members: list[tuple[str, bytes]], form: int, **info: Any) -> memoryview:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in info.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(content))
    return memoryview(buffer.getvalue())


def by_tarfile(data: memoryview) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [Member(member.name, member.offset_data, member.size) for member in archive if member.isfile()]


def slowly(data: memoryview) -> list[Member]:
    return list(members_of(lambda start, size: data[start : start + size].tobytes()))


@given(
    st.lists(st.tuples(NAMES, CONTENTS), min_size=1, max_size=8),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    st.sampled_from([0, 1.5]),
)
def test_the_index_is_the_one_of_tarfile(members: list[tuple[str, bytes]], form: int, mtime: float) -> None:
    data = written(members, form, mtime=mtime)
    assert index(data) == slowly(data) == by_tarfile(data)


def test_old_names_with_a_prefix_and_big_numbers_are_read() -> None:
    long = "/".join(["folder" * 5] * 4) + "/x.json"
    data = written([(long, b"1"), ("y.json", b"22")], tarfile.USTAR_FORMAT)
    assert index(data) == by_tarfile(data)
    assert index(data)[0].name == long
    header = bytearray(data)
    header[124:136] = b"\x80" + (1).to_bytes(11, "big")  # as GNU tar writes sizes of 8 GiB and more
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:512]) + 8 * 32)
    assert index(memoryview(bytes(header))) == by_tarfile(data)


@pytest.mark.parametrize(
    "kind", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, b"V", b"D", b"A", b"I"]
)
def test_what_is_no_file_is_passed_over(kind: bytes) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        other = tarfile.TarInfo("other")
        other.type, other.linkname = kind, "a.txt"
        archive.addfile(other)
        member = tarfile.TarInfo("a.txt")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    data = memoryview(buffer.getvalue())
    assert index(data) == by_tarfile(data) == [Member("a.txt", 1024, 3)]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_hard_link_is_the_file_that_it_names(form: int) -> None:
    long = "d/" * 70 + "a.png"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, link in ((long, ""), ("b.png", long), ("c.png", "b.png"), ("c.txt", "")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = b"1" if link else b"0", link, 0 if link else 3
            archive.addfile(member, io.BytesIO(b"abc"))
    shard = Shard("0.tar", buffer.getvalue())
    assert [shard.members(place) for place in range(3)] == [{"png": b"abc"}, {"png": b"abc"}, {"png": b"abc", "txt": b"abc"}]


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ({"type": b"S"}, "stored without its zeros"),
        ({"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.name": "a.npy"}}, "stored without its zeros"),
        ({"pax_headers": {"SCHILY.realsize": "9"}}, "stored without its zeros"),
        ({"type": b"M"}, "a part of a file"),
        ({"pax_headers": {"GNU.volume.offset": "9"}}, "a part of a file"),
        ({"type": b"Z"}, "of the type 'Z', which is not known"),
        ({"type": b"N"}, "of the type 'N', which is not known"),
        ({"type": b"1", "linkname": "gone"}, "a hard link to 'gone', which does not stand before it"),
    ],
)
def test_a_member_whose_data_would_vanish_is_refused_by_name(info: dict[str, Any], said: str) -> None:
    data = written([("a.npy", b"123")], tarfile.PAX_FORMAT, **info)
    with pytest.raises(tar.KindError, match=f"'a.npy' is {said}"):
        index(data)
    with pytest.raises(DataError, match=f"shard 0.tar cannot be read: its member 'a.npy' is {said}"):
        Shard("0.tar", data)
    damaged = bytearray(data)
    damaged[bytes(data).rindex(b"a.npy") + 156] = ord("Q")
    with pytest.raises(ValueError, match="does not agree with its checksum") as caught:
        index(memoryview(bytes(damaged)))
    assert not isinstance(caught.value, tar.KindError)


def test_a_pax_header_of_all_members_counts_for_each() -> None:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"size": "3", "comment": "x"}
    ) as archive:
        for name in ("a.txt", "b.txt"):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
    data = memoryview(buffer.getvalue())
    assert index(data) == by_tarfile(data)


def test_an_old_folder_is_no_file() -> None:
    """Before POSIX a folder was a file of no bytes whose name ends with a slash."""
    data = bytearray(written([("d!", b""), ("a.txt", b"1")], tarfile.USTAR_FORMAT))
    data[1:2], data[156] = b"/", 0
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 8 * 32)
    assert index(memoryview(bytes(data))) == by_tarfile(memoryview(bytes(data))) == [Member("a.txt", 1024, 1)]


OTHERS = [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_long_name_is_of_the_next_header_alone_whatever_that_is(form: int, kind: bytes) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, type_ in (("d" * 120, kind), ("a.png", b"0"), ("e" * 130 + ".txt", b"0"), ("b.png", b"0")):
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = type_, 3 if type_ == b"0" else 0, "l" * 120 if type_ == b"2" else ""
            archive.addfile(member, io.BytesIO(b"abc"))
    data = memoryview(buffer.getvalue())
    assert index(data) == by_tarfile(data)
    assert [member.name for member in index(data)] == ["a.png", "e" * 130 + ".txt", "b.png"]


def test_a_folder_of_a_long_name_costs_no_sample() -> None:
    """As `tar --sort=name` writes a folder beside files: it comes before them."""
    members = {"z1.png": b"picture", "z1.txt": b"a caption"}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        folder = tarfile.TarInfo("./" + "d" * 120)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in members.items():
            member = tarfile.TarInfo("./" + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    shard = Shard("0.tar", buffer.getvalue())
    assert len(shard) == 1
    assert shard.members(0) == {"png": b"picture", "txt": b"a caption"}


def test_a_size_below_zero_is_damage_and_does_not_turn_in_circles() -> None:
    data = written([("a", b"1")], tarfile.PAX_FORMAT, pax_headers={"size": "-512"})
    with pytest.raises(ValueError, match="a size below 0"):
        index(data)


def test_content_that_looks_like_headers_is_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tar within a tar holds the magic word at the very places where headers would have it."""
    inner = bytes(written([("x", b"1" * 700)], tarfile.PAX_FORMAT))
    data = written([("a.tar", inner), ("b", b"2")], tarfile.PAX_FORMAT)
    assert index(data) == by_tarfile(data)
    assert tar._index_of_plain(data) is None


def test_plain_shards_take_the_fast_way() -> None:
    assert tar._index_of_plain(written([("a.json", b"{}"), ("a.png", b"x" * 512)], tarfile.PAX_FORMAT)) is not None


@given(st.lists(st.tuples(st.sampled_from(["a.b", "c.d"]), CONTENTS), min_size=1, max_size=5), st.data())
def test_a_flipped_byte_in_a_header_and_a_cut_are_found(members: list[tuple[str, bytes]], draw: st.DataObject) -> None:
    data = written(members, tarfile.PAX_FORMAT)
    place = draw.draw(st.sampled_from([member.start - 512 for member in by_tarfile(data)]))
    at = place + draw.draw(st.integers(0, 511))
    broken = bytearray(data)
    broken[at] ^= draw.draw(st.integers(1, 255))
    for read in (index, slowly):
        try:
            found = read(memoryview(bytes(broken)))
        except ValueError:
            continue
        # The one thing that may differ unseen is how the sum itself is written (its filling blanks and zeros).
        assert found == by_tarfile(data)
        assert place + 148 <= at < place + 156
    end = by_tarfile(data)[-1]
    cut = draw.draw(st.integers(0, end.start + end.size))
    for read in (index, slowly):
        with pytest.raises(ValueError, match=r"end of data|checksum|invalid literal|damaged"):
            read(data[:cut])
