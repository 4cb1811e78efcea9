"""Every run file with every DeepSpeed JSON on few and many ranks: a table, or one sentence with a way out."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from megadiff.cli import main as cli

ROOT = Path(__file__).parents[2]
RUNS = sorted(path.stem for path in (ROOT / "configs" / "run").glob("*.yaml"))
JSONS = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
WAY_OUT = re.compile(r"nearest: |multiple of|numbers of ranks that fit|use at most|start a multiple")


@pytest.mark.parametrize(("run", "json"), list(product(RUNS, JSONS)))
def test_check_config_gives_a_table_or_a_sentence_with_a_way_out(
    run: str, json: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    tables = 0
    for ranks in (1, 2, 8, 64):
        arguments = ["check-config", f"configs/run/{run}.yaml", "--deepspeed", f"ds_configs/{json}.json", "--ranks", str(ranks)]
        code = cli.main(arguments)
        said = capsys.readouterr()
        if code == 0:
            tables += 1
            assert "bytes sent per step" in said.out
            assert said.out.endswith("sound\n")
        else:
            assert code == 2
            assert said.out == ""
            assert said.err.count("\n") == 1, said.err
            assert WAY_OUT.search(said.err), said.err
    assert tables or "numbers of ranks that fit the model: 1" in said.err
