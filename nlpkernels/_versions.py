"""Whether the compiled libraries are for the torch that is there: asked before any of them is loaded.

Built with another torch, they end in an undefined symbol, or in a crash.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, distribution

import torch


def _source() -> str:
    """Where pip has this package from."""
    try:
        text = distribution("nlpkernels").read_text("direct_url.json")
    except PackageNotFoundError:
        text = None
    if text is None:
        return "nlpkernels"
    told = json.loads(text)
    commit = told.get("vcs_info", {}).get("commit_id")
    return f"git+{told['url']}@{commit}" if commit else str(told["url"]).removeprefix("file://")


def problem() -> str | None:
    """What is the matter and the command that helps, in one line; None if nothing is."""
    again = f"pip install --force-reinstall --no-cache-dir --no-deps --no-build-isolation {_source()}"
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
