"""What a build lacks is told in one line, with what helps, whichever way it was started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (TREE / "setup.py").exists(), reason="the source is not here")

BUILD = "sys.argv = ['-c', 'bdist_wheel']; exec(open('setup.py').read())"  # as pip and uv do
BY_HAND = "sys.argv = ['setup.py', 'build_ext']; exec(open('setup.py').read())"
AN_INSTALL = "ninja 'setuptools>=77', then the same command again with --no-build-isolation"


def said(code: str, folder: Path = TREE, **environment: str) -> list[str]:
    """Our lines of what a build writes to stderr before it fails (a torch for CUDA warns that there is none)."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(TREE)!r}); {code}"],
        cwd=folder,
        env={**{k: v for k, v in os.environ.items() if k != "UV"}, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("nlpkernels: ")
    return [line for line in lines if line.startswith("nlpkernels: ")]


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """The compiler by another name; a test changes what it does first."""
    path = tmp_path / "a-compiler"
    path.write_text('#!/bin/sh\n\nexec c++ "$@"\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("code", "environment", "expected"),
    [
        (f"sys.modules['torch'] = None; {BUILD}", {}, ["no torch here", f": pip install 'torch>=2.10' {AN_INSTALL}"]),
        (f"sys.modules['torch'] = None; {BUILD}", {"UV": "/bin/uv"}, [f": uv pip install 'torch>=2.10' {AN_INSTALL}"]),
        (f"sys.modules['torch'] = None; {BY_HAND}", {}, ["'setuptools>=77', then the same command again"]),
        ("sys.modules['setuptools'] = None; import build_backend", {}, ["no setuptools here", AN_INSTALL]),
        (f"import torch; torch.__version__ = '2.9.1+cu128'; {BUILD}", {}, ["torch 2.9.1+cu128 is too old", AN_INSTALL]),
        (f"import setuptools; setuptools.__version__ = '76.1'; {BUILD}", {}, ["76.1 is too old", AN_INSTALL]),
        (BUILD, {"CXX": "nonesuch -g"}, ["no C++ compiler (nonesuch not found): install g++"]),
        (f"import sysconfig; sysconfig.get_path = lambda name: '/'; {BUILD}", {}, ["no Python.h", "install python3."]),
        (BUILD, {"NLPKERNELS_BUILD_CPU": "sse"}, ["NLPKERNELS_BUILD_CPU is 'sse'"]),
    ],
)
def test_what_is_missing(code: str, environment: dict[str, str], expected: list[str]) -> None:
    (line,) = said(code, **environment)
    assert all(part in line for part in expected)


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP is used on Linux")
@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ('case "$*" in *-fopenmp*) exit 1;; esac', "has no OpenMP (omp.h): install g++"),
        ("set -- -D__clang__ $*", "is Clang, whose OpenMP would be a second one beside torch's"),
    ],
)
def test_another_openmp(compiler: Path, first: str, expected: str) -> None:
    compiler.write_text(compiler.read_text().replace("\n\n", f"\n{first}\n"))
    (line,) = said(BUILD, CXX=str(compiler))
    assert expected in line
    assert line.endswith("set CXX=g++")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder where nobody can write, root neither")
def test_a_tree_that_cannot_be_written_to() -> None:
    (line,) = said(BUILD.replace("'setup.py'", f"'{TREE / 'setup.py'}'"), Path("/proc"))
    assert line.startswith("nlpkernels: /proc cannot be written to")


def test_a_killed_compiler(tmp_path: Path, compiler: Path) -> None:
    compiler.write_text(compiler.read_text().replace("\n\n", '\ncase " $* " in *" -c "*) kill -9 $$;; esac\n'))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TREE / name, tmp_path)
    shutil.copytree(TREE / "csrc", tmp_path / "csrc")
    (tmp_path / "nlpkernels").mkdir()
    build = BUILD.replace("bdist_wheel", "build_ext")
    lines = said(build, tmp_path, CXX=str(compiler), NLPKERNELS_BUILD_CPU="default", MAX_JOBS="1", FORCE_CUDA="0")
    assert "nlpkernels: library 1 of 2, _C: library.cpp" in lines
    assert lines[-1].endswith("memory was short: set MAX_JOBS=1, for one file at a time")
