"""Tables of every configuration key, from the schema: its type, its default, and the docstring below its field."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from trainer.config.llm_systems import LLM4RecConfig
from trainer.config.schema import RunConfig

_HEADINGS = {"": "Run", "data": "Data", "train": "Training", "evaluation": "Evaluation", "engine": "Engine"}


@dataclass(frozen=True)
class Key:
    """One configuration key."""

    name: str
    """The whole path: `train.lr`."""
    type: str
    default: str
    meaning: str
    """Its docstring, in one line."""


def systems() -> dict[str, type[BaseModel]]:
    """System sections by `system.name`, in the order of the schema."""
    union = get_args(RunConfig.model_fields["system"].annotation)
    return {get_args(member.model_fields["name"].annotation)[0]: member for member in union}


def keys(model: type[BaseModel], prefix: str = "", *, without: type[BaseModel] | None = None) -> Iterator[Key]:
    """Yield the keys of a section and of the sections in it; the union of systems is left out.

    Args:
        without: a parent section whose keys are left out.
    """
    known = dict(_schema(model))
    docstrings = _docstrings(model)
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        section = next((part for part in (field.annotation, *get_args(field.annotation)) if _is_section(part)), None)
        if name == "system" or (without and name in without.model_fields):
            continue
        if section is not None:
            yield from keys(section, f"{path}.")
        elif name == "name":
            yield Key(path, "text", "", f"`{get_args(field.annotation)[0]}`")
        else:
            default = "required" if field.is_required() else f"`{_value(field.get_default(call_default_factory=True))}`"
            yield Key(path, _type(known[name]), default, docstrings.get(name, ""))


def configuration_tables(root: Path) -> str:
    """All keys as Markdown: one section after the other, then each system."""
    del root
    every = list(keys(RunConfig))
    lines: list[str] = []
    for section, heading in _HEADINGS.items():
        lines += [f"### {heading}", "", *_table(key for key in every if key.name.rpartition(".")[0] == section), ""]
    lines += ["### Systems with an LLM: common keys", "", f"{inspect.getdoc(LLM4RecConfig)}", ""]
    lines += [*_table(keys(LLM4RecConfig, "system.")), ""]
    for name, model in systems().items():
        common = LLM4RecConfig if issubclass(model, LLM4RecConfig) else None
        lines += [f"### {name}", "", " ".join(str(inspect.getdoc(model)).split()), ""]
        if common:
            lines += ["Also the [common keys](#systems-with-an-llm-common-keys).", ""]
        lines += [*_table(keys(model, "system.", without=common)), ""]
    return "\n".join(lines)


def _table(rows: Iterator[Key]) -> list[str]:
    head = ["| key | type | default | |", "|---|---|---|---|"]
    return head + [
        "| " + " | ".join([f"`{row.name}`", _cell(row.type), _cell(row.default), _cell(row.meaning)]) + " |"
        for row in rows
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _is_section(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, BaseModel)


def _schema(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """JSON schema of each field."""
    properties: dict[str, dict[str, Any]] = model.model_json_schema()["properties"]
    return properties


def _type(schema: dict[str, Any]) -> str:
    """The type of a value in words: `integer ≥ 1, or none`."""
    if "anyOf" in schema:
        return ", or ".join(_type(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        if "prefixItems" in schema:
            return f"list of {len(schema['prefixItems'])}: {_type(schema['prefixItems'][0])}"
        return f"list of {_type(schema['items'])}"
    if schema.get("format") == "path":
        return "path"
    names = {"string": "text", "null": "none", "boolean": "`true` `false`"}
    words = names.get(schema["type"], schema["type"])
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    # The largest integers of 32 and 64 bits are no bounds that anyone meets.
    limits = [f"{sign} {_value(schema[key])}" for key, sign in bounds.items() if abs(schema.get(key, 2**31)) < 2**31]
    return " ".join([words, ", ".join(limits)]).strip()


def _value(value: Any) -> str:
    """A default as YAML writes it on one line."""
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False).strip('"')


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Docstrings of fields, also of inherited ones, on one line each; a string below an assignment is no attribute."""
    found: dict[str, str] = {}
    for parent in reversed(model.__mro__):
        if parent is BaseModel or not issubclass(parent, BaseModel):
            continue
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(parent))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = below.value if isinstance(below, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found[field.target.id] = " ".join(text.value.split())
    return found
