"""Links between pages of the site and files of the repository.

In the repository, pages link to files outside of `docs/` by relative paths, which work wherever the repository is
browsed. On the site, a link to a Markdown file that is a page leads to that page, and any other file becomes a page
that shows its text.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "ds_configs/README.md": "ds_configs/README.md",
    "benchmarks/README.md": "benchmarks/README.md",
    "benchmarks/data.md": "benchmarks/data.md",
    "benchmarks/faults.md": "benchmarks/faults.md",
    "benchmarks/id_models.md": "benchmarks/id_models.md",
    "benchmarks/predicted.md": "benchmarks/predicted.md",
    "benchmarks/quality.md": "benchmarks/quality.md",
    "benchmarks/recipe.md": "benchmarks/recipe.md",
    "benchmarks/reproduction/README.md": "benchmarks/reproduction/README.md",
    "benchmarks/serving.md": "benchmarks/serving.md",
    "benchmarks/warm_start.md": "benchmarks/warm_start.md",
    "benchmarks/cluster/scaling.md": "benchmarks/cluster/scaling.md",
}
"""Markdown files outside of `docs/` that are pages of the site, with their paths there."""

_CODE = re.compile(r"(^```.*?^```[^\n]*$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
_ELSEWHERE = ("http://", "https://", "mailto:", "#")
_LANGUAGES = {".py": "python", ".json": "json", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash", ".toml": "toml"}


def repository_path(page: str) -> str:
    """Path in the repository of a page of the site."""
    outside = {uri: path for path, uri in PAGES.items()}
    return outside.get(page, f"docs/{page}")


def site_uri(path: str) -> str:
    """Path on the site of a file of the repository, whether it is a page already or becomes one."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}.md"


def links(markdown: str, page: str) -> Iterator[str]:
    """Yield the paths in the repository to which a page's relative links lead, outside of code."""
    for number, part in enumerate(_CODE.split(markdown)):
        if number % 2 == 0:
            yield from (_target(link, page)[0] for link in _LINK.findall(part) if not link.startswith(_ELSEWHERE))


def rewrite(markdown: str, page: str, exists: Callable[[str], bool]) -> str:
    """Replace a page's relative links by links within the site.

    Args:
        exists: whether a path in the repository is a file; links to anything else stay, and mkdocs reports them.
    """

    def moved(match: re.Match[str]) -> str:
        link = match[1]
        if link.startswith(_ELSEWHERE):
            return link
        path, anchor = _target(link, page)
        if not exists(path):
            return link
        return posixpath.relpath(site_uri(path), posixpath.dirname(page) or ".") + anchor

    parts = _CODE.split(markdown)
    parts[::2] = [_LINK.sub(moved, part) for part in parts[::2]]
    return "".join(parts)


def source_page(root: Path, path: str) -> str:
    """The page that shows a source file; the search leaves it out."""
    text = (root / path).read_text(encoding="utf-8")
    language = _LANGUAGES.get(PurePosixPath(path).suffix, "text")
    return f'---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n````{language} linenums="1"\n{text.rstrip()}\n````\n'


def _target(link: str, page: str) -> tuple[str, str]:
    """A relative link's path in the repository, and its anchor."""
    path, hash_, anchor = link.partition("#")
    folder = posixpath.dirname(repository_path(page))
    return posixpath.normpath(posixpath.join(folder, path)), hash_ + anchor
