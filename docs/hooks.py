"""Hooks of MkDocs: pages are written for the repository, and also become a site.

Links in them are relative in the repository, so that they work where its files are read. On the
site, the documents of the top level are pages too, and pictures come along wherever they lie. A
link to a source file leads to ``extra.source_url``, or is its text alone where that is not set.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the documents of the top level, and the pictures that pages show from elsewhere."""
    for name in TOP_LEVEL:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for page in list(files.documentation_pages()):
        for _mark, _text, link in _LINK.findall(page.content_string):
            place = _place(page.src_uri, link)
            if place.endswith(".png") and not files.get_file_from_path(_uri(place)):
                picture = str(ROOT / place)
                files.append(File.generated(config, _uri(place), abs_src_path=picture))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files, **_: Any) -> str:
    """Rewrite the links of a page, outside of its code."""
    source_url = str(config["extra"].get("source_url") or "").rstrip("/")

    def rewritten(match: re.Match[str]) -> str:
        mark, text, link = match.groups()
        if "://" in link or link.startswith(("#", "mailto:")):
            return match[0]
        path, _, anchor = link.partition("#")
        place = _place(page.file.src_uri, path)
        file = files.get_file_from_path(_uri(place))
        if file is not None and file.inclusion.is_included():
            target = posixpath.relpath(_uri(place), posixpath.dirname(page.file.src_uri) or ".")
            return f"{mark}[{text}]({target}{'#' if anchor else ''}{anchor})"
        if not (ROOT / place).exists():
            return match[0]  # MkDocs then says that it leads nowhere
        return f"[{text}]({source_url}/blob/HEAD/{place})" if source_url else text

    parts = _CODE.split(markdown)
    return "".join(p if p.startswith("```") else _LINK.sub(rewritten, p) for p in parts)


def _place(page: str, link: str) -> str:
    """A link of a page, as a path in the repository."""
    folder = "" if page in TOP_LEVEL else posixpath.join("docs", posixpath.dirname(page))
    return os.path.normpath(posixpath.join(folder, link))


def _uri(place: str) -> str:
    """A path in the repository, as MkDocs knows it."""
    return place.removeprefix("docs/")
