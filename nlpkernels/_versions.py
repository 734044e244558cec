"""Whether the compiled libraries are for the torch that is there: asked before any of them is loaded.

Built with another torch, they end in an undefined symbol, or in a crash.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from shlex import quote
from urllib.parse import unquote

import torch


def _how_installed() -> tuple[str, str]:
    """The installer that brought this package, and from where."""
    tree = Path(__file__).parents[1]
    source = str(tree) if (tree / "pyproject.toml").exists() else "nlpkernels"
    try:
        found = distribution("nlpkernels")
    except PackageNotFoundError:
        return "pip", quote(source)
    installer = "uv pip" if (found.read_text("INSTALLER") or "").strip() == "uv" else "pip"
    if text := found.read_text("direct_url.json"):
        told = json.loads(text)
        commit = told.get("vcs_info", {}).get("commit_id")
        source = f"git+{told['url']}@{commit}" if commit else unquote(told["url"].removeprefix("file://"))
        if told.get("dir_info", {}).get("editable"):
            return installer, f"--editable {quote(source)}"
    return installer, quote(source)


def problem() -> str | None:
    """What is the matter and the command that helps, in one line; None if nothing is."""
    installer, source = _how_installed()
    again = f"{installer} install --force-reinstall --no-cache-dir --no-deps --no-build-isolation {source}"
    try:
        from nlpkernels import _built
    except ImportError:
        return f"nlpkernels is not compiled: {again}"
    found = torch.__version__
    if _built.TORCH.split(".")[:2] == found.split(".")[:2]:
        return None
    return f"nlpkernels was built with torch {_built.TORCH} and found torch {found}; to build it for that: {again}"


def check() -> None:
    """Raise an ImportError of one line if there is a problem; end `python -m nlpkernels` with it."""
    told = problem()
    if told is None:
        return
    if sys.argv[:1] == ["-m"]:
        sys.exit(told)
    raise ImportError(told)
