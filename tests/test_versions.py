"""Libraries that were compiled with another torch, or not at all, are found out before one is loaded."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

import nlpkernels
from nlpkernels import _built, _versions

MAJOR, MINOR, *REST = torch.__version__.split(".")


def test_this_torch_is_the_one() -> None:
    assert _built.TORCH.split(".")[:2] == [MAJOR, MINOR]
    assert _versions.problem() is None


@pytest.mark.parametrize("built", [None, f"{MAJOR}.{int(MINOR) + 1}.0", f"{int(MAJOR) - 1}.{MINOR}.0+cu126"])
def test_another_torch_is_told_in_one_line(tmp_path: Path, built: str | None) -> None:
    package = tmp_path / "nlpkernels"
    shutil.copytree(
        Path(nlpkernels.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "_built.py", "__*__")
    )
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(Path(nlpkernels.__file__).with_name(name), package)
    # (That there is none has to be said: an editable install finds its own.)
    (package / "_built.py").write_text("raise ImportError" if built is None else f"TORCH = {built!r}")
    expected = "is not compiled" if built is None else f"built with torch {built} and found torch {torch.__version__}"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for arguments in (["-c", "import nlpkernels"], ["-m", "nlpkernels"]):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 1
        *before, last = done.stderr.strip().splitlines()
        assert expected in last
        assert "pip install --force-reinstall --no-cache-dir --no-deps --no-build-isolation " in last
        assert before == [] or arguments[0] == "-c"


@pytest.mark.parametrize("patch", ["0", "7+cu130"])
def test_another_patch_release_will_do(patch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_built, "TORCH", f"{MAJOR}.{MINOR}.{patch}")
    assert _versions.problem() is None


@pytest.mark.parametrize(
    ("installer", "told", "expected"),
    [
        ("pip", {"url": "file:///a%20b/nlpkernels", "dir_info": {}}, "pip install {} '/a b/nlpkernels'"),
        ("uv", {"url": "file:///a", "dir_info": {"editable": True}}, "uv pip install {} --editable /a"),
        (
            "pip",
            {"url": "file:///a", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}},
            "pip install {} git+file:///a@c0ffee",
        ),
        ("uv", {"url": "file:///a.tar.gz", "archive_info": {}}, "uv pip install {} /a.tar.gz"),
        ("pip", None, "pip install {} nlpkernels"),
        (None, None, "pip install {} nlpkernels"),
    ],
)
def test_the_command_fits_the_way_of_the_install(
    installer: str | None,
    told: dict[str, Any] | None,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def distribution(name: str) -> Distribution:
        if installer is None:
            raise PackageNotFoundError
        return Distribution.at(tmp_path)

    (tmp_path / "INSTALLER").write_text(f"{installer}\n")
    if told is not None:
        (tmp_path / "direct_url.json").write_text(json.dumps(told))
    monkeypatch.setattr(_versions, "distribution", distribution)
    monkeypatch.setattr(_versions, "__file__", str(tmp_path / "site-packages" / "nlpkernels" / "_versions.py"))
    monkeypatch.setattr(_built, "TORCH", "1.0")
    problem = _versions.problem()
    assert problem is not None
    flags = "--force-reinstall --no-cache-dir --no-deps --no-build-isolation"
    assert problem.endswith(f": {expected.format(flags)}")


def test_a_source_tree_is_built_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise PackageNotFoundError

    tree = Path(__file__).parents[1]
    if not (tree / "pyproject.toml").exists():
        pytest.skip("the source is not here")
    monkeypatch.setattr(_versions, "distribution", none)
    monkeypatch.setattr(_versions, "__file__", str(tree / "nlpkernels" / "_versions.py"))
    monkeypatch.setattr(_built, "TORCH", "1.0")
    assert str(_versions.problem()).endswith(f" --no-build-isolation {shlex.quote(str(tree))}")
