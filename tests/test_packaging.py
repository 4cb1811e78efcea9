"""What a wheel holds: kernels/ and launcher/ come in through the symlinks of the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_holds_every_module_under_megadiff_and_nothing_beside_it(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: setuptools writes build/ and *.egg-info beside setup.py
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("megadiff", "kernels", "launcher"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    ended = subprocess.run([*command, "-w", str(tmp_path), str(source)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        scripts = archive.read(next(name for name in archive.namelist() if name.endswith("entry_points.txt"))).decode()
    modules = (ROOT / "megadiff").rglob("*.py")
    expected = {"megadiff/py.typed", *(path.relative_to(ROOT).as_posix() for path in modules)}
    for room in ("kernels", "launcher"):
        expected |= {f"megadiff/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / room).rglob("*.py")}
    assert held == expected
    assert "megadiff/launcher/local.py" in held
    assert "megadiff = megadiff.cli.main:main" in scripts
