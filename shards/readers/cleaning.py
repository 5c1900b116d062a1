"""Titles as a person would write them: HTML unescaped and without tags; scripts, NaN and lists are no titles.

Crawled catalogs hold `&quot;`, whole `<span>` elements and the JavaScript of a page where a title should be. A language
model would read all of it.
"""

import html
import re
from collections import Counter
from collections.abc import Callable

import polars as pl

from shards.manifest import parse_json

# Without the semicolon `&copper` would be read as `&copy` and `per`.
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_INLINE = "a|abbr|b|big|cite|code|em|font|i|img|ins|mark|s|small|span|strike|strong|sub|sup|tt|u|var"
_BLOCK = "blockquote|br|center|dd|div|dl|dt|h[1-6]|hr|li|ol|p|pre|table|tbody|td|th|thead|tr|ul"
# Names of HTML only: `<3` and `List<String>` are text.
_INLINE_TAG = re.compile(rf"</?(?:{_INLINE})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_BLOCK_TAG = re.compile(rf"</?(?:{_BLOCK})(?:\s[^<>]*)?/?>", re.IGNORECASE)
# All repeats are bounded or end at a character that they exclude: a text made to be slow stays linear.
_HIDDEN = re.compile(r"<(script|style)\b[^<>]{0,500}>.*?(?:</\1\s?>|$)|<!--.*?(?:-->|$)", re.IGNORECASE | re.DOTALL)
_SCRIPT = re.compile(
    r"\b(?:var|let|const) [\w$]{1,99} ?=[^;]{0,500};|\bfunction ?\w{0,99} ?\([^)]{0,500}\) ?\{|\.getTime\(\)"
    r"|\bdocument\.(?:write|getElement)|\bwindow\.\w{1,99} ?=",
)
_PLACEHOLDERS = {"nan", "NaN", "None", "null", "NULL", "<NA>"}


def clean_titles(titles: pl.DataFrame, counts: Counter[str]) -> pl.DataFrame:
    """Clean the texts of items.

    Args:
        titles: raw_id and texts, of which `title` is the first; null if missing.
        counts: gets the number of titles that were changed or found missing, by reason.
    """
    columns = []
    for name in titles.columns[1:]:
        kept = counts if name == "title" else Counter[str]()
        columns.append(pl.Series(name, [_clean(text, kept) for text in titles[name]], dtype=pl.String))
    return titles.with_columns(columns)


def _clean(text: str | None, counts: Counter[str]) -> str | None:
    if text is None or not text:
        return text
    if text in _PLACEHOLDERS:
        counts["titles_nan_or_none"] += 1
        return None
    if text[0] in "[{" and _is_json(text):
        counts["titles_not_text"] += 1
        return None
    steps: tuple[tuple[str, Callable[[str], str]], ...] = (
        ("titles_unescaped", _unescape),
        ("titles_without_tags", _strip_tags),
    )
    for reason, step in steps:
        changed = step(text)
        if changed != text:
            counts[reason] += 1
            text = changed
    if _SCRIPT.search(text):
        counts["titles_scripts"] += 1
        return None
    return text


def _unescape(text: str) -> str:
    """Twice: `&amp;quot;` is a quotation mark that was escaped twice."""
    for _ in range(2):
        if "&" in text:
            text = _ENTITY.sub(lambda entity: html.unescape(entity.group()), text)
    return text


def _strip_tags(text: str) -> str:
    if "<" not in text:
        return text
    return _INLINE_TAG.sub("", _BLOCK_TAG.sub(" ", _HIDDEN.sub(" ", text)))


def _is_json(text: str) -> bool:
    """Whether text is a JSON list or object, as a value that is not text is read; `[REC]` and `[2]` are titles."""
    if '"' not in text and text not in ("[]", "{}"):
        return False
    try:
        return isinstance(parse_json(text), list | dict)
    except ValueError:
        return False
