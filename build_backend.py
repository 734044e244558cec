"""What pip and uv build with: setuptools. A venv of Python 3.12 has none: there setup.py says what helps."""

try:
    from setuptools.build_meta import *  # noqa: F403
except ModuleNotFoundError:
    from pathlib import Path

    exec(Path("setup.py").read_text())
