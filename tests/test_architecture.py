"""The doors of the architecture: who may import whom. Imports are read with ast, inside functions as well."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "megadiff"

DOORS: dict[str, frozenset[str]] = {
    room: frozenset(names.split())
    for room, names in {
        "types": "config",
        "rng": "",
        "files": "",
        "torchvision_ops": "",
        "config": "",
        "kernels": "types rng",
        "storage": "config",
        "launcher": "config files",
        "distributed": "config storage",
        "data": "types rng files torchvision_ops config storage distributed report",
        "report": "config",
        "models": "types config kernels",
        "diffusion": "types rng config kernels",
        "weights": "types files config storage models",
        "engine": "types config kernels distributed models weights",
        "training": "types files config distributed data diffusion engine weights",
        "generation": "types rng config storage distributed data diffusion weights report",
        "evaluation": "types rng files torchvision_ops config storage distributed data diffusion weights generation report",
        "interfaces": "torchvision_ops config data diffusion models weights generation",
        "cli": "types files config storage distributed data training weights generation evaluation report interfaces launcher",
        "__init__": "",
        "__main__": "cli",
    }.items()
}
"""Who imports whom. A door that nobody uses fails a test."""
COMING: dict[tuple[str, str], str] = {}
"""Doors that may be used, and by what, though nobody does yet."""
NARROW = {("data", "report"): "data/inspection/", ("distributed", "storage"): "distributed/preflight.py"}
"""Doors that are for a part of a room only."""
DATA_LEAVES = frozenset({"errors", "buckets", "pictures", "threads", "generator", "csv_text", "npy"})
DATA_DOORS: dict[str, frozenset[str]] = {
    "shards": frozenset(),
    "codecs": frozenset({"shards"}),
    "reading": frozenset({"shards", "codecs"}),
    "packing": frozenset({"shards", "codecs"}),
    "recipes": frozenset({"shards", "codecs", "packing"}),
    "inspection": frozenset({"shards", "codecs"}),
}
"""The rooms within data; all of them use its leaves."""

ONLY_IN = {
    "deepspeed": re.compile(r"engine/.*"),
    "megatron": re.compile(r"engine/.*"),
    "triton": re.compile(r"kernels/[^/]+/triton\.py"),
    "obstore": re.compile(r"storage/.*"),
    "webdataset": re.compile(r"data/.*"),
}
"""Packages that one place alone may import."""

NOT_IN = {"torch": re.compile(r"(config|launcher)/.*")}


def violations(package: Path) -> list[str]:
    """Every import of a package's files that no door allows, as `file:line imports what`."""
    found = []
    for path, name in sources(package):
        room = name.split("/")[0].removesuffix(".py")
        for module, line in imports(ast.parse(path.read_text(encoding="utf-8")), name):
            if fault := verdict(room, name, module):
                found.append(f"{name}:{line} {fault}")
    return found


def sources(package: Path) -> Iterator[tuple[Path, str]]:
    """(file, name within the package); kernels and launcher are reached through their symlinks."""
    for top in sorted(package.iterdir()):
        # Path.rglob does not enter a symlink below its start.
        for path in sorted(top.resolve().rglob("*.py")) if top.is_dir() else [top] if top.suffix == ".py" else []:
            yield path, (f"{top.name}/{path.relative_to(top.resolve()).as_posix()}" if top.is_dir() else top.name)


def imports(tree: ast.AST, name: str) -> Iterator[tuple[str, int]]:
    """(absolute module name, line) of every import, relative ones resolved, importlib's with a constant name included."""
    parents = [PACKAGE, *name.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from megadiff import engine` names the room only among the aliases.
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


def verdict(room: str, name: str, module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == PACKAGE:
        target = parts[1] if len(parts) > 1 else ""
        if target in DOORS and target != room and not _may(room, target):
            allowed = ", ".join(sorted(DOORS.get(room, ()))) or "nothing of ours"
            return f"imports {PACKAGE}.{target}, but {room} may import {allowed}"
        if not name.startswith(NARROW.get((room, target), "")):
            return f"imports {PACKAGE}.{target}, which is for {NARROW[room, target]} only"
        return (
            _data_verdict(name.split("/")[1].removesuffix(".py"), parts[2]) if room == target == "data" and parts[2:] else None
        )
    if parts[0] in ONLY_IN and not ONLY_IN[parts[0]].fullmatch(name):
        return f"imports {parts[0]}, which only {ONLY_IN[parts[0]].pattern} may"
    if parts[0] in NOT_IN and NOT_IN[parts[0]].fullmatch(name):
        return f"imports {parts[0]}, which {NOT_IN[parts[0]].pattern} may not"
    if room == "launcher" and parts[0] not in sys.stdlib_module_names:
        return f"imports {parts[0]}, but launcher is the standard library and {PACKAGE}.config only"
    if parts[0] in ("kernels", "launcher"):
        return f"imports {parts[0]}; write {PACKAGE}.{parts[0]}"
    return None


def _may(room: str, target: str) -> bool:
    return target in DOORS.get(room, ()) or (room, target) in COMING


def _data_verdict(own: str, target: str) -> str | None:
    """Of an import within data, from one of its rooms or leaves to another."""
    if own in (target, "__init__") or target in DATA_LEAVES or target in DATA_DOORS.get(own, ()):
        return None
    allowed = ", ".join(sorted(DATA_DOORS.get(own, ()))) or "the leaves"
    return f"imports {PACKAGE}.data.{target}, but data's {own} may import {allowed}"


def graph(package: Path) -> dict[str, set[str]]:
    """By module of the package the modules that it imports, late imports included."""
    modules = {}
    for path, name in sources(package):
        modules[f"{PACKAGE}.{name.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}"] = (path, name)
    edges: dict[str, set[str]] = {}
    for module, (path, name) in modules.items():
        edges[module] = set()
        for imported, _ in imports(ast.parse(path.read_text(encoding="utf-8")), name):
            while imported and imported not in modules:
                imported = imported.rpartition(".")[0]
            edges[module] |= {imported} - {"", module}
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or through others: from each a way back to itself."""
    found = []
    for start in sorted(edges):
        before: dict[str, str] = {}
        waiting = [start]
        while waiting and start not in before:
            module = waiting.pop()
            for imported in edges.get(module, ()):
                if imported not in before:
                    before[imported] = module
                    waiting.append(imported)
        if start in before:
            way = [start]
            while before[way[-1]] != start:
                way.append(before[way[-1]])
            found.append([start, *reversed(way)])
    return found


def used_doors(package: Path) -> set[tuple[str, str]]:
    used = set()
    for path, name in sources(package):
        room = name.split("/")[0].removesuffix(".py")
        for module, _ in imports(ast.parse(path.read_text(encoding="utf-8")), name):
            parts = module.split(".")
            if parts[0] == PACKAGE and parts[1:] and parts[1] in DOORS and parts[1] != room:
                used.add((room, parts[1]))
    return used


def test_no_module_imports_itself_through_others() -> None:
    assert circles(graph(ROOT / PACKAGE)) == []


def test_every_door_is_used_or_marked_as_coming() -> None:
    doors = {(room, target) for room, targets in DOORS.items() for target in targets}
    used = used_doors(ROOT / PACKAGE)
    assert doors - used == set(), "doors that nobody uses"
    assert set(COMING) & (used | doors) == set(), "used by now: it belongs among the doors"


def test_a_planted_circle_is_found(tmp_path: Path) -> None:
    for name, code in {
        "models/one.py": "from megadiff.models import two",
        "models/two.py": "def late():\n    from megadiff.models.three import x",
        "models/three.py": "import megadiff.models.one",
        "models/four.py": "from megadiff.models.one import x",
    }.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    rooms = {room for way in circles(graph(tmp_path / PACKAGE)) for room in way}
    assert rooms == {f"{PACKAGE}.models.{name}" for name in ("one", "two", "three")}


def test_every_import_goes_through_a_door() -> None:
    assert violations(ROOT / PACKAGE) == []


def test_every_room_is_read_and_known() -> None:
    rooms = {name.split("/")[0].removesuffix(".py") for _, name in sources(ROOT / PACKAGE)}
    assert {"config", "launcher", "kernels", "engine", "cli"} <= rooms
    assert rooms <= set(DOORS)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("models/net.py", "from megadiff.diffusion import process"),
        ("diffusion/net.py", "import megadiff.models.mmdit"),
        ("training/loop.py", "from megadiff import evaluation"),
        ("training/loop.py", "from ..evaluation.gap import measure"),
        ("training/loop.py", "from .. import cli"),
        ("data/recipes/emoji.py", "from ...engine import zero"),
        ("engine/api.py", "def late():\n    from megadiff.diffusion import objective"),
        ("interfaces/page.py", "import importlib\nimportlib.import_module('megadiff.cli.main')"),
        ("training/loop.py", "import deepspeed"),
        ("models/net.py", "from megatron.core import parallel_state"),
        ("kernels/op/reference.py", "import triton.language as tl"),
        ("data/loader.py", "from obstore.store import S3Store"),
        ("storage/store.py", "import webdataset as wds"),
        ("config/derived.py", "def late():\n    import torch"),
        ("launcher/local.py", "import torch"),
        ("launcher/local.py", "import yaml"),
        ("cli/main.py", "import kernels"),
        ("data/reading/loader.py", "from megadiff.data.packing import units"),
        ("data/codecs/base.py", "from megadiff.data.reading.loader import Loader"),
        ("data/pictures.py", "def late():\n    from megadiff.data.shards import shard"),
        ("data/codecs/base.py", "from megadiff.report import sheet"),
        ("data/codecs/base.py", "from megadiff.data.unlisted import anything"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, name: str, code: str) -> None:
    path = tmp_path / PACKAGE / name
    path.parent.mkdir(parents=True)
    path.write_text(code)
    found = violations(tmp_path / PACKAGE)
    assert len(found) == 1
    assert found[0].startswith(f"{name}:{len(code.splitlines())} ")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("kernels/op/triton.py", "import triton"),
        ("engine/zero.py", "import deepspeed\nfrom megatron import core"),
        ("models/net.py", "from .attention import Attention\nfrom megadiff.kernels.op import op\nimport torch"),
        ("launcher/local.py", "import os\nfrom megadiff.config.schema import Run"),
        ("cli/main.py", "from megadiff import training, __version__"),
        ("data/recipes/emoji.py", "from megadiff.data.packing.claims import claim\nfrom megadiff.data.errors import DataError"),
    ],
)
def test_what_a_door_allows_is_not_reported(tmp_path: Path, name: str, code: str) -> None:
    path = tmp_path / PACKAGE / name
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert violations(tmp_path / PACKAGE) == []


@pytest.mark.parametrize("room", ["kernels", "launcher"])
def test_the_two_top_level_rooms_are_relative_symlinks_without_an_init_file(room: str) -> None:
    """With an `__init__.py` they would answer to other packages that probe for a module named `kernels`."""
    link = ROOT / PACKAGE / room
    assert link.is_symlink()
    assert link.readlink() == Path("..") / room
    assert not (ROOT / room / "__init__.py").exists()
    assert not (ROOT / "tests" / room / "__init__.py").exists()
