"""Finds the files that a path stands for, and how text tables of a source are written."""

import glob
import logging
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from shards.formats.delimited import Layout
from shards.formats.tables import file_format, table_columns
from shards.formats.textfiles import is_utf8
from shards.manifest import DatasetError
from shards.readers.sources import Columns, Source

log = logging.getLogger("shards")


def reviews_layout(path: Path, source: Source, columns: Columns) -> Layout:
    """The layout of a file of reviews."""
    named = (columns.user, columns.item, columns.time)
    return _headerless(path, _typed(columns.layout, source), source.headerless, named)


def meta_layout(path: Path, source: Source, columns: Columns) -> Layout:
    """The layout of a file of titles, which is Latin-1 in the older releases of some sources."""
    layout = _with_encoding(path, _typed(columns.meta_layout, source), source)
    return _headerless(path, layout, source.meta_headerless, (columns.meta_item, columns.item, columns.title))


def _typed(layout: Layout, source: Source) -> Layout:
    return replace(layout, typed=True) if source.typed else layout


def _headerless(
    path: Path, given: Layout, headerless: tuple[tuple[str, ...], ...], named: tuple[str | None, ...]
) -> Layout:
    """The given layout, or that of the source's files without a header if the file is one.

    Args:
        headerless: columns of files without a header, which have different numbers of them.
        named: columns that the user named; a file that has one has a header.
    """
    if given.names is not None or not headerless or file_format(path, given) != "text":
        return given
    header = {name for names in headerless for name in names} | set(named)
    for names in headerless:
        if header & set(table_columns(path, names, given)):
            return given
        layout = replace(given, names=names)
        try:
            table_columns(path, names, layout)
        except DatasetError:  # a different number of columns
            continue
        return layout
    return given


def _with_encoding(path: Path, layout: Layout, source: Source) -> Layout:
    if not source.latin1 or layout.encoding != "utf-8":
        return layout
    if file_format(path, replace(layout, encoding="latin-1")) != "text" or is_utf8(path):
        return layout
    log.info("note: %s is not UTF-8: read as Latin-1, as in the older releases", path.name)
    return replace(layout, encoding="latin-1")


def expand(paths: tuple[Path, ...], patterns: tuple[str, ...], without: tuple[str, ...] = ()) -> tuple[Path, ...]:
    """Files that the paths stand for: themselves, those in folders that match `patterns`, and those that globs match.

    Args:
        without: patterns of files in folders that are left out.

    Raises:
        DatasetError: a folder or a glob without such files.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            files = _files_in(path, patterns, without)
            if not files:
                raise DatasetError(f"{path} has no files named {', '.join(patterns)}: give the files themselves")
        elif not path.exists() and glob.has_magic(str(path)):
            files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
            if not files:
                raise DatasetError(f"{path} matches no files: check the pattern")
        else:
            files = [path]
        found += files
    return tuple(found)


def expand_meta(paths: tuple[Path, ...], source: Source) -> tuple[Path, ...]:
    """Files with titles that the paths stand for; in a folder without names of titles, all its files have them.

    Raises:
        DatasetError: a folder or a glob without files.
    """
    named = [path.is_dir() and bool(_files_in(path, source.meta, ())) for path in paths]
    kinds = [source.meta if known else source.reviews for known in named]
    return tuple(file for path, kind in zip(paths, kinds, strict=True) for file in expand((path,), kind))


def meta_beside(paths: tuple[Path, ...], source: Source) -> tuple[Path, ...]:
    """Files with titles in the folders among `paths`, for a source whose files of titles have names of their own."""
    folders = [path for path in paths if path.is_dir() and source.meta]
    return tuple(file for folder in folders for file in _files_in(folder, source.meta, ()))


def _files_in(folder: Path, patterns: tuple[str, ...], without: tuple[str, ...]) -> list[Path]:
    """Matching files at any depth; names that begin with a dot or underscore are notes of the writer (`_SUCCESS`)."""

    def among(path: Path, patterns: tuple[str, ...]) -> bool:
        inside = path.relative_to(folder).as_posix()
        return any(fnmatch(path.name, pattern) or fnmatch(inside, pattern) for pattern in patterns)

    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
        and among(path, patterns)
        and not among(path, without)
    )
