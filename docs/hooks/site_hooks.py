"""What mkdocs calls while it builds the site: adds pages from outside of `docs/`, and fills in generated tables."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from config_reference import configuration_tables
from error_table import error_tables
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from site_links import PAGES, links, repository_path, rewrite, site_uri, source_page

ROOT = Path(__file__).parents[2]

GENERATED = {"<!-- generated: configuration -->": configuration_tables, "<!-- generated: errors -->": error_tables}
"""Comments in pages, and the functions whose Markdown takes their place."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages outside of `docs/`, and a page for every file of the repository that some page links to."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / path).read_text(encoding="utf-8")))
    waiting = deque(file for file in files if file.is_documentation_page())
    while waiting:
        page = waiting.popleft()
        for path in links(page.content_string, page.src_uri):
            uri = site_uri(path)
            if uri.startswith("source/") and (ROOT / path).is_file() and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, content=source_page(ROOT, path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the generated tables, and turn links to files of the repository into links within the site."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    for comment, generate in GENERATED.items():
        if comment in markdown:
            markdown = markdown.replace(comment, generate(ROOT))
    return rewrite(markdown, uri, lambda path: (ROOT / path).is_file() and path != repository_path(uri))
