"""Loads YAML and `section.key=value` overrides into a validated `RunConfig`; errors name the key and the cure."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trainer.config.presets import find_preset, preset_names
from trainer.config.schema import RunConfig, built_on
from trainer.config.section import Section

# Keys that may change when a run is resumed, because they do not change its result: locations (checkpoints identify
# their inputs by hash), how long it trains, how often it saves and logs, how it is spread over processes.
_FREE_ON_RESUME: dict[str, Any] = {
    "output": True,
    "resume": True,
    "engine": True,
    "evaluation": {"batch_size", "decode", "lists", "test_histories"},
    "data": {"path", "workers", "verify"},
    "train": {
        "epochs",
        "max_steps",
        "micro_batch_size",
        "patience",
        "save_minutes",
        "save_every",
        "keep_checkpoints",
        "log_every",
        "trackers",
    },
}


_LATER: dict[str, set[str]] = {
    "data": {"training_order", "repeat_dates"},
    "system": {
        "max_vector_items",
        "batch_negatives",
        "log_q",
        "projector_init",
        "score_distill_weight",
        "teacher_titles",
    },
    "train": {"decay_steps", "decay_from", "init_from"},
}
"""Keys that are younger than some checkpoints: at its default, such a key is left out of the hash."""

SectionT = TypeVar("SectionT", bound=Section)

# Numbers that YAML 1.1 reads as text, such as 3e-4.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


_SHORT = reprlib.Repr()
"""Shows values in messages, whatever their size and depth."""
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 200, 200


class ConfigError(ValueError):
    """An invalid run configuration; the message names each wrong key by its path, and the cure."""


def load_config(preset: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a YAML file and apply `section.key=value` overrides.

    The value of a key that holds text or a path is taken as is (one pair of quotes around it is dropped); that of other
    keys is YAML.

    Args:
        preset: a file, or the name of a packaged preset such as `sasrec`.

    Raises:
        ConfigError: the file is missing or not a YAML mapping, an override is not `key=value`, a key or value is wrong;
            errors of overrides name the command line.
    """
    tree = _read_yaml(Path(preset))
    given = [_apply_override(tree, word) for word in overrides]
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        by_source: dict[str, list[str]] = {}
        for detail in error.errors():
            by_source.setdefault(_source(detail, str(preset), given), []).append(_explain(detail))
        raise ConfigError("; ".join(f"{source}: {'; '.join(lines)}" for source, lines in by_source.items())) from None


def _source(detail: ErrorDetails, preset: str, given: Sequence[tuple[str, ...]]) -> str:
    """Where a wrong value comes from, given the keys of the overrides."""
    location = tuple(_location(detail)[0])
    if detail["type"].startswith("union_tag"):
        location = (*location, "name")
    if any(location[: len(key)] == key for key in given):
        return "the command line"
    # Of a section whose keys do not fit together, some may be overrides.
    return f"{preset} and the command line" if any(key[: len(location)] == location for key in given) else preset


def applicable_overrides(preset: Path, overrides: Sequence[str]) -> list[str]:
    """Select the `section.key=value` overrides whose key exists for a preset's system.

    Raises:
        ConfigError: the file is missing, or it names no known system.
    """
    section = _read_yaml(preset).get("system")
    name = section.get("name") if isinstance(section, dict) else None
    if name not in _systems():
        load_config(preset)  # raises with the reason
        raise AssertionError(f"{preset} loads, but its system is unknown")
    keys = [(word, word.partition("=")[0].split(".")) for word in overrides]
    return [word for word, key in keys if key[-1] in _keys_beside(key, name)]


def parse_config(tree: dict[str, Any], source: str) -> RunConfig:
    """Validate a nested mapping; errors begin with `source`.

    Raises:
        ConfigError: a key or value is wrong, or a key is missing; all of them are named.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def load_section(path: Path, kind: type[SectionT]) -> SectionT:
    """Load a YAML file that describes something else than a run, such as an experiment.

    Raises:
        ConfigError: the file is missing or not a YAML mapping, or a key or value is wrong; all of them are named.
    """
    try:
        return kind.model_validate(_read_yaml(path))
    except ValidationError as error:
        lines = [
            f"'{'.'.join(map(str, d['loc']))}': {d['msg']} (got {_SHORT.repr(d['input'])})" for d in error.errors()
        ]
        raise ConfigError(f"{path}: " + "; ".join(lines)) from None


def dump_config(config: RunConfig) -> str:
    """Dump a configuration as YAML, defaults included; `load_config` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Copy a configuration with all paths made absolute, so that it works from any working directory."""
    tree = config.model_dump(mode="json")
    tree["output"], tree["data"]["path"] = str(config.output.absolute()), str(config.data.path.absolute())
    if config.train.init_from is not None:
        tree["train"]["init_from"] = str(config.train.init_from.absolute())
    for key, path in built_on(config.system).items():
        tree["system"][key] = str(path.absolute())
    for section in tree["system"].values():
        # `path` of a language model or encoder is a folder or a hub id; only a folder has an absolute path.
        if isinstance(section, dict) and Path(section.get("path", "")).is_dir() and section.get("path"):
            section["path"] = str(Path(section["path"]).absolute())
        if isinstance(section, dict) and section.get("title_store"):
            section["title_store"] = str(Path(section["title_store"]).absolute())
    return RunConfig.model_validate(tree)


def flatten(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the leaves of a nested mapping, each with its keys from the top."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, (*above, key))
        else:
            yield (*above, key), value


def config_hash(config: RunConfig) -> str:
    """Hash of the settings that decide the result, 12 hex digits; equal hashes may resume each other's checkpoints."""
    # Excluded: paths of source runs and models, which checkpoints identify by hash; activation checkpointing and the
    # prefix cache, which change no result; kernels, which change only rounding, as a different device does.
    excluded: dict[str, Any] = dict.fromkeys(built_on(config.system), True)
    excluded |= {
        name: {"path", "kernels", "recompute", "title_store"}
        for name in type(config.system).model_fields
        if hasattr(getattr(config.system, name), "path")
    }
    tree = config.model_dump(mode="json", exclude=_FREE_ON_RESUME | {"system": excluded})
    if config.train.init_from is not None:  # named alike from every working folder
        tree["train"]["init_from"] = str(config.train.init_from.absolute())
    for section, names in _LATER.items():
        fields = type(getattr(config, section)).model_fields
        for name in names & set(fields):
            if tree[section][name] == fields[name].default:
                del tree[section][name]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


class _Loader(yaml.SafeLoader):
    """Reads plain data without aliases, by which a file of a kilobyte would expand to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            where = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read: write the value out", problem_mark=where)
        return super().compose_node(parent, index)


def _parse_yaml(text: str) -> Any:
    """Parse YAML that anyone may have written.

    Raises:
        yaml.YAMLError, ValueError: not YAML, or not data that a configuration may hold.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = _parse_yaml(find_preset(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        presets = ", ".join(preset_names())
        raise ConfigError(f"no such file: {path} (presets in trainer/presets: {presets})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid date, 2024-99-99
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must contain a mapping of sections (output, data, system, train, ...)")
    return tree


def _apply_override(tree: dict[str, Any], word: str) -> tuple[str, ...]:
    """Set a value in the tree; returns its key, part by part."""
    key, separator, text = word.partition("=")
    if not separator or not key:
        raise ConfigError(f"'{word}' is not an override: write section.key=value, for example train.lr=3e-4")
    *sections, leaf = key.split(".")
    value = _override_value(tree, [*sections, leaf], word, text)
    for name in sections:
        branch = tree[name] = {} if tree.get(name) is None else tree[name]  # None: an empty `train:`
        if not isinstance(branch, dict):
            raise ConfigError(f"'{word}': {name} is a value, not a section")
        tree = branch
    tree[leaf] = value
    return (*sections, leaf)


def _override_value(tree: dict[str, Any], location: list[str], word: str, text: str) -> Any:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if text and not quoted and (kinds := _kinds(tree, location)):
        nothing = text == "null" and type(None) in kinds
        if not nothing and kinds <= {str, Path, type(None)}:
            return text
    try:
        value = _parse_yaml(text)
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"'{word}': the value is not valid YAML; quote it") from None
    if isinstance(value, str) and _EXPONENT.fullmatch(text):
        return float(text)  # YAML 1.1 wants 3.0e-4 and reads 3e-4 as text
    return value


def _kinds(tree: dict[str, Any], location: list[str]) -> set[Any]:
    """The types that a key takes; empty for a key that does not exist, which validation reports."""
    section = tree.get("system")
    name = section.get("name") if isinstance(section, dict) else None
    if location[0] == "system" and not (isinstance(name, str) and name in _systems()):
        return set()
    models = _sections(location, str(name))
    return {kind for model in models if location[-1] in model.model_fields
            for kind in _members(model.model_fields[location[-1]].annotation)}  # fmt: skip


def _members(annotation: Any) -> set[Any]:
    """The members of a union, without what annotates them; texts of a literal are `str`."""
    parts = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return {member for part in parts for member in _members(part)}
    if get_origin(annotation) is Annotated:
        return _members(parts[0])
    if get_origin(annotation) is Literal:
        return {type(part) for part in parts}
    return {annotation}


def _location(detail: ErrorDetails) -> tuple[list[str], str]:
    """The key of a wrong value, part by part, and the name of the system if it is one of its keys."""
    location = [str(part) for part in detail["loc"]]
    # pydantic inserts the chosen member of the tagged union into the path, which users never wrote.
    system = location.pop(1) if len(location) > 1 and location[0] == "system" else ""
    return location, system


def _explain(detail: ErrorDetails) -> str:
    location, system = _location(detail)
    path = ".".join(location)
    if detail["type"] == "extra_forbidden":
        known = _keys_beside(location, system)
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        cure = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key '{path}' ({cure})"
    if detail["type"] == "missing":
        return f"missing key '{path}' (set it in the preset or pass {path}=...)"
    if detail["type"] == "union_tag_not_found":
        return f"missing key '{path}.name' (one of: {', '.join(_system_names())})"
    if detail["type"] == "union_tag_invalid":
        name = _SHORT.repr(detail["input"].get("name"))
        return f"unknown system {name} in '{path}.name' (one of: {', '.join(_system_names())})"
    return f"'{path}': {detail['msg']} (got {_SHORT.repr(detail['input'])})"


def keys_named(name: str) -> list[str]:
    """All settings whose last part is `name`, such as `train.lr`."""
    sections = {
        key: field.annotation
        for key, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    found = [name] if name in set(RunConfig.model_fields) - set(sections) else []
    found += [f"{key}.{name}" for key, section in sections.items() if name in section.model_fields]
    if any(name in section.model_fields for section in _systems().values()):
        found.append(f"system.{name}")
    return found


def _systems() -> dict[str, type[BaseModel]]:
    """System sections by their `system.name`."""
    union = RunConfig.model_fields["system"].annotation
    return {get_args(member.model_fields["name"].annotation)[0]: member for member in get_args(union)}


def _system_names() -> list[str]:
    return sorted(_systems())


def _keys_beside(location: list[str], system: str) -> list[str]:
    """Valid keys of the section that `location` is in; `system` is the name of the system."""
    return sorted({key for model in _sections(location, system) for key in model.model_fields})


def _sections(location: list[str], system: str) -> list[type[BaseModel]]:
    """The sections that `location` may be in."""
    models: list[type[BaseModel]] = [RunConfig]
    for name in location[:-1]:
        if name == "system":
            models = [_systems()[system]]
            continue
        found = [model.model_fields[name].annotation for model in models if name in model.model_fields]
        models = [model for model in found if isinstance(model, type) and issubclass(model, BaseModel)]
    return models
