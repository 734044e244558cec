"""Pages of the documentation that lie outside of docs: README.md is its first page. Called by mkdocs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def _moved(text: str) -> str:
    """With links as they are from within docs."""
    for page, outside in PAGES.items():
        text = text.replace(f"]({outside}", f"]({page}").replace(f"](../{outside}", f"]({page}")
    return re.sub(r"\]\((?:\.\./)?docs/", "](", text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, outside in PAGES.items():
        files.append(File.generated(config, page, content=_moved((ROOT / outside).read_text(encoding="utf-8"))))
    for plot in sorted((ROOT / "bench" / "results").glob("*.png")):
        files.append(File.generated(config, f"plots/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _moved(markdown).replace("](../bench/results/", "](plots/")
