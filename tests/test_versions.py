"""Libraries that were compiled with another torch, or not at all, are found out before one is loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

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
