"""Exports: a folder that is whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from megadiff.config.errors import UserError
from megadiff.weights import export

FULL = "No space left on device"


def fails(error: Exception) -> Any:
    def write(*arguments: Any, **_: Any) -> None:
        target = arguments[-1] if isinstance(arguments[-1], Path) else arguments[0]
        Path(target).touch()
        raise error

    return write


@pytest.mark.parametrize("was_there", [False, True])
@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (export, "save_file", SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
        (Path, "write_bytes", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        (Path, "write_text", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing_that_blocks_the_same_export(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception, was_there: bool
) -> None:
    out, found = tmp_path / "out", export.read(exported)
    if was_there:
        out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails(error))
        with pytest.raises(UserError, match=f"out cannot be written: {FULL}"):
            export.write(out, found)
    assert out.exists() == was_there
    assert not was_there or not list(out.iterdir())
    export.write(out, found)
    assert export.read(out).tensors.keys() == found.tensors.keys()


def test_what_goes_wrong_elsewhere_is_not_said_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="other"), export.new_folder(tmp_path / "out"):
        (tmp_path / "other").read_bytes()
    with pytest.raises(ZeroDivisionError), export.new_folder(tmp_path / "out"):
        (tmp_path / "out/part").write_text(str(1 / 0))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", ["file", "folder"])
def test_a_folder_with_something_in_it_stays_as_it_is(exported: Path, tmp_path: Path, inside: str) -> None:
    (tmp_path / "mine").touch() if inside == "file" else (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="is there already; name a new folder"):
        export.write(tmp_path, export.read(exported))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
