"""A data set in a bucket belongs to whoever made it first."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadiff.config.errors import UserError
from megadiff.data.recipes import table
from megadiff.storage import store


def test_a_data_set_in_a_bucket_goes_on_with_its_own_command_and_refuses_another(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n" + "".join(f"{i},{i % 3}\n" for i in range(20)))
    for _ in range(2):
        table.make_table(str(tmp_path / "t.csv"), f"{bucket}/first")
    with pytest.raises(UserError, match="other settings"):
        table.make_table(str(tmp_path / "t.csv"), f"{bucket}/first", held_out_share=0)
    store.write_bytes(f"{bucket}/second/held_out/0.tar", b"theirs")
    with pytest.raises(UserError, match=r"holds another data set \(held_out/0.tar\)"):
        table.make_table(str(tmp_path / "t.csv"), f"{bucket}/second")
