"""YAML -> Run: `base:` chains, `a.b=c` overrides, stages that state only their differences."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megadiff.config.errors import ConfigError
from megadiff.config.run_folder import RUN, RunFolder
from megadiff.config.schema import Cluster, Run
from megadiff.config.schema.cluster import KINDS
from megadiff.config.schema.data import OTHER

Tree = dict[str, Any]
S = TypeVar("S", bound=BaseModel)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree by dotted address."""
    return {
        address: leaf
        for key, value in tree.items()
        for address, leaf in (
            leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        ).items()
    }


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run file.

    A file may name `base:` (one file or a list, relative to itself): later ones win, the file itself wins over them.
    `stage_defaults:` is merged under every entry of `stages:`, and each of those may have a `base:` of its own.
    Sections with a `kind` are replaced, not merged, when the kind changes. The run file in a run's folder is of that folder,
    wherever it has been moved since it was written.

    Args:
        overrides: `a.b.c=value` with the value in YAML; stages are addressed by name (`stages.joint.steps=10`), or all at
            once (`stages.*.steps=10`).

    Raises:
        ConfigError: a file is missing or is no YAML, a key is unknown (the nearest known one is named), a value is wrong.
    """
    path = Path(path)
    tree = _read_with_bases(path, ())
    tree = _unshared(_merge_stage_defaults(tree, path))
    if path.name == RUN and RunFolder(path.parent).launched:
        tree["folder"] = str(path.parent)
    for override in overrides:
        _apply_override(tree, override)
    return validate(tree, str(path))


def validate(tree: Tree, where: str) -> Run:
    """Check a merged tree; all faults at once."""
    return _validate(Run, tree, where)


def load_cluster(path: str | Path, overrides: Sequence[str] = ()) -> Cluster:
    """Read a cluster file; `base:` and overrides as in `load_run`.

    Raises:
        ConfigError: a file is missing or is no YAML, the kind or a key is unknown, a value is wrong.
    """
    tree = _unshared(_read_with_bases(Path(path), ()))
    for override in overrides:
        _apply_override(tree, override)
    kind = tree.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{path}: kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    return _validate(KINDS[kind], tree, str(path))


def dump_cluster(cluster: Cluster) -> str:
    """The keys that a cluster was given, as YAML; `load_cluster` reads it back to an equal one."""
    tree = {"kind": cluster.kind, **cluster.model_dump(mode="json", exclude_unset=True)}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _validate(section: type[S], tree: Tree, where: str) -> S:
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(fault, section) for fault in error.errors())) from None


def dump_run(run: Run) -> str:
    """The resolved run as YAML; `load_run` reads it back to an equal Run."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def merge(under: Tree, over: Tree) -> Tree:
    """`over` wins; dicts are merged, lists replaced; a section whose `kind` changes is replaced whole."""
    if "kind" in over and over.get("kind") != under.get("kind", over.get("kind")):
        return dict(over)
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _read_yaml(path: Path) -> Tree:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the path of a run file such as configs/run/quickstart.yaml") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; give the path of a YAML run file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{place} is not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    return tree


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> Tree:
    resolved = path.resolve()
    if resolved in seen:
        raise ConfigError(f"{path}: its `base:` chain comes back to itself")
    tree = _read_yaml(path)
    bases = tree.pop("base", [])
    merged: Tree = {}
    if not isinstance(bases, str | list):
        raise ConfigError(f"{path}: `base` must be a file name or a list of them, not {bases!r}")
    for base in [bases] if isinstance(bases, str) else bases:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: `base` must be a file name or a list of them, not {base!r}")
        merged = merge(merged, _read_with_bases(path.parent / base, (*seen, resolved)))
    stages = tree.get("stages")
    for stage in stages if isinstance(stages, list) else []:
        if isinstance(stage, dict) and "base" in stage:
            if not isinstance(stage["base"], str):
                raise ConfigError(f"{path}: a stage's `base` must be one file name, not {stage['base']!r}")
            stage["base"] = str(resolved.parent / stage["base"])
    return merge(merged, tree)


def _merge_stage_defaults(tree: Tree, path: Path) -> Tree:
    defaults = tree.pop("stage_defaults", {})
    if not isinstance(defaults, dict):
        raise ConfigError(f"{path}: stage_defaults must be a mapping")
    stages = tree.get("stages", [])
    if not isinstance(stages, list):
        raise ConfigError(f"{path}: stages must be a list")
    merged = []
    for index, stage in enumerate(stages):
        if not isinstance(stage, dict):
            raise ConfigError(f"{path}: stages.{index} must be a mapping")
        own = dict(stage)
        base = own.pop("base", None)
        below = _read_with_bases(Path(base), ()) if base else {}
        merged.append(merge(merge(defaults, below), own))
    return {**tree, "stages": merged}


def _unshared(tree: Any) -> Any:
    """A copy in which no section is another one's too: of stage_defaults, or by YAML's anchors."""
    if isinstance(tree, dict):
        return {key: _unshared(value) for key, value in tree.items()}
    return [_unshared(value) for value in tree] if isinstance(tree, list) else tree


def _apply_override(tree: Tree, override: str) -> None:
    address, separator, text = override.partition("=")
    if not separator or not address:
        raise ConfigError(f"override {override!r} must look like a.b=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from None
    parts = address.split(".")
    for node in _nodes(tree, parts[:-1], override):
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parts[:-1])} is not a section")
        below = node.get(parts[-1])
        node[parts[-1]] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value


def _nodes(tree: Any, parts: Sequence[str], override: str) -> Iterable[Any]:
    if not parts:
        return [tree]
    head, rest = parts[0], parts[1:]
    if isinstance(tree, list):
        names = [item.get("name") if isinstance(item, dict) else None for item in tree]
        chosen = [item for item, name in zip(tree, names, strict=True) if head in ("*", name)]
        if not chosen:
            raise ConfigError(f"override {override!r}: no stage is called {head}; stages: {', '.join(map(str, names))}")
        return [node for item in chosen for node in _nodes(item, rest, override)]
    if not isinstance(tree, dict):
        raise ConfigError(f"override {override!r}: {head} is not a section")
    if not isinstance(tree.get(head), dict | list):
        tree[head] = {}
    return _nodes(tree[head], rest, override)


def _explain(fault: Any, section: type[BaseModel]) -> str:
    location = [str(part) for part in fault["loc"] if part != OTHER]
    place = ".".join(location)
    if fault["type"] == "extra_forbidden":
        known = _known_keys(section, fault["loc"][:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {place}; {hint}"
    if fault["type"] == "missing":
        return f"{place} is missing"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:] if message[:1].isupper() and not message[1:2].isupper() else message
    if fault["type"] == "value_error":
        return f"{place}: {message}" if place else message
    return f"{place} is {fault['input']!r}: {message}"


def _known_keys(section: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The keys that a section has at a location of a pydantic error (union members appear there by their kind)."""
    current: list[Any] = [section]
    for part in location:
        current = [inner for annotation in current for inner in _step(annotation, part)]
    return sorted({key for model in current if _is_model(model) for key in model.model_fields})


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _step(annotation: Any, part: str | int) -> list[Any]:
    if _is_model(annotation):
        kind = annotation.model_fields.get("kind")
        if kind is not None and part == kind.default:
            return [annotation]
        field = annotation.model_fields.get(str(part))
        return _members(field.annotation) if field is not None else []
    origin = typing.get_origin(annotation)
    if origin is dict:
        return _members(typing.get_args(annotation)[1])
    if origin in (list, tuple):
        return _members(typing.get_args(annotation)[0])
    return []


def _members(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [inner for member in typing.get_args(annotation) for inner in _members(member)]
    return [annotation]
