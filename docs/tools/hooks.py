"""What the site has besides the pages of docs/: results and cards from the repository, and the page of commands.

Pages link to each other as they do in the repository. Here links to files that the site does not hold (source code,
measured JSON) become the words that they stand on.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# Pages and pictures from outside docs/, by patterns below the repository's root.
BESIDE = (
    "results/*.md",
    "results/*/*.md",
    "results/*/*.png",
    "assets/*/README.md",
    "examples/README.md",
    "examples/*.png",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "CITATION.cff",
)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```.*?^```[^\n]*$)", re.M | re.S)


def on_config(config: Any) -> Any:
    """Leave out of the menu what is not there yet."""
    sys.path.insert(0, str(ROOT))
    config["nav"] = _there(config["nav"])
    return config


def _there(nav: list[Any]) -> list[Any]:
    kept: list[Any] = []
    for entry in nav:
        (title, what) = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(what, list):
            if inside := _there(what):
                kept.append({title: inside})
        elif what == "commands.md" or (DOCS / what).is_file() or (ROOT / what).is_file():
            kept.append(entry)
    return kept


def on_files(files: Files, config: Any) -> Files:
    """Add what lies elsewhere in the repository, and the page of commands."""
    from docs.tools.commands import page

    files.append(File.generated(config, "commands.md", content=page()))
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config["site_dir"], config["use_directory_urls"]))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn the repository's links into the site's."""
    source = page.file.src_uri
    here = (DOCS if (DOCS / source).is_file() else ROOT) / posixpath.dirname(source)

    def link(found: re.Match[str]) -> str:
        picture, text, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        path, _, anchor = target.partition("#")
        name = _site_name((here / path).resolve(), files)
        if name is None:
            return text if text.startswith("`") or picture else f"`{text}`" if "." in text and " " not in text else text
        there = posixpath.relpath(name, posixpath.dirname(source) or ".")
        return f"{picture}[{text}]({there}{'#' + anchor if anchor else ''})"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def _site_name(path: Path, files: Files) -> str | None:
    """What the site calls a file or folder of the repository; None: it has no such page."""
    for base in (DOCS, ROOT):
        if path.is_relative_to(base):
            name = path.relative_to(base).as_posix()
            if files.get_file_from_path(name) is not None:
                return name
            if files.get_file_from_path(f"{name}/README.md") is not None:
                return f"{name}/README.md"
    return None
