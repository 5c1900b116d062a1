"""Tables of the errors that the code raises for its users, read from the source: each message names its own cure."""

from __future__ import annotations

import ast
import html
from dataclasses import dataclass
from functools import cache
from pathlib import Path

RAISED = (
    "CheckpointError", "ConfigError", "ConnectionError", "DatasetError", "LLMError", "NonFiniteError", "OSError",
    "PrefixCacheError", "ValueError",
)  # fmt: skip
"""Exceptions that commands print as one line."""

TOPICS = {
    "Configuration, and what a run builds on": ("trainer/config", "trainer/runs"),
    "Datasets": ("shards", "trainer/data/reading"),
    "Language models and text encoders": ("trainer/nn", "trainer/data", "trainer/models"),
    "Ranks, devices and checkpoints": ("trainer/engine", "trainer/di", "trainer/de", "trainer/gaudi"),
    "Evaluation, reports and audits": ("trainer/evaluation", "trainer/reports", "trainer/planner"),
    "Commands, experiments and Slurm jobs": ("launchers", "trainer/workflows", "trainer/api"),
}
"""Headings, and the sources below each; a file belongs to the first that matches."""


@dataclass(frozen=True)
class Message:
    """An error message in the source."""

    text: str
    """With `<name>` where a value stands."""
    file: str


@cache
def messages(root: Path) -> tuple[Message, ...]:
    """The message of each error that the packages raise, with the file that checks it, without repetitions."""
    found: dict[Message, None] = {}
    for package in ("trainer", "shards", "launchers"):
        for path in sorted((root / package).glob("**/*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            texts = _named_texts(tree)
            for node in ast.walk(tree):
                message = Message(_message(node, texts), path.relative_to(root).as_posix())
                # Shorter ones only pass on a text that is built, and listed, elsewhere.
                if len(message.text.split()) > 3:
                    found[message] = None
    return tuple(found)


def error_tables(root: Path) -> str:
    """One table per topic, as Markdown."""
    found: dict[str, list[Message]] = {topic: [] for topic in TOPICS}
    for message in messages(root):
        found[topic_of(message.file)].append(message)
    lines = []
    for topic, rows in found.items():
        lines += [f"### {topic}", "", "| message | checked in |", "|---|---|"]
        lines += [f"| {_cell(row.text)} | `{row.file}` |" for row in sorted(rows, key=lambda row: (row.file, row.text))]
        lines.append("")
    return "\n".join(lines)


def topic_of(file: str) -> str:
    """The heading below which the errors of a file are listed."""
    return next(topic for topic, places in TOPICS.items() if file.startswith(places))


def _named_texts(tree: ast.Module) -> dict[str, ast.expr]:
    """Texts that a module assigns to a name once, or that one of its functions returns: parts of messages."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found.setdefault(name, []).append(value)
            case ast.FunctionDef(name=name):
                returned = [each.value for each in ast.walk(node) if isinstance(each, ast.Return) and each.value]
                found[f"{name}()"] = [value for value in returned if _is_text(value)]
    return {name: values[0] for name, values in found.items() if len(values) == 1 and _is_text(values[0])}


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _message(node: ast.AST, texts: dict[str, ast.expr]) -> str:
    """The message of a `raise` statement; empty if it raises none of these errors, or one without a text of its own."""
    if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)):
        return ""
    if node.exc.func.id not in RAISED or not node.exc.args:
        return ""
    return " ".join(_text(node.exc.args[0], texts).split())


def _text(node: ast.expr, texts: dict[str, ast.expr]) -> str:
    """The text that an expression builds; values are named by the last word of their expression."""
    match node:
        case ast.Constant(value=str() as text):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part, texts) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left, texts) + _text(right, texts)
        case ast.FormattedValue(value=value):
            return _text(value, texts)
        case ast.Call(func=ast.Name(id=name)) if (called := f"{name}()") in texts:
            return _text(texts[called], _without(texts, called))
        case ast.Name(id=name) if name in texts:
            return _text(texts[name], _without(texts, name))
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return f"<{name.strip('_').lower()}>"
        case _:
            return "<…>"


def _without(texts: dict[str, ast.expr], name: str) -> dict[str, ast.expr]:
    """All texts but one, which is being built: a name may occur in its own text."""
    return {other: text for other, text in texts.items() if other != name}


def _cell(text: str) -> str:
    """As code, which shows the characters of a message as they are."""
    return f"<code>{html.escape(text)}</code>".replace("|", "&#124;").replace("`", "&#96;").replace("*", "&#42;")
