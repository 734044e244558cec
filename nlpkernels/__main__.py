"""`python -m nlpkernels`: what was built and what was picked, to be pasted into a bug report."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from nlpkernels import _built, _ops


def _own_version() -> str:
    try:
        return version("nlpkernels")
    except PackageNotFoundError:
        return "not installed, run from its source"


def main() -> None:
    """Print it."""
    built = [name for name in _ops.INSTRUCTION_SETS if _ops._library(f"_cpu_{name}")]
    built_for = f"kernels built for {_ops.CUDA_ARCHS}" if _ops.CUDA_ARCHS else "no kernels built"
    is_neon = _ops.INSTRUCTION_SET == "default" and platform.machine().lower() in ("aarch64", "arm64")  # always there
    picked = f"{_ops.INSTRUCTION_SET}{' (NEON)' if is_neon else ''}: {_ops.INSTRUCTION_SET_REASON}"
    others = "torch's layers and ATen ops" if _ops.LEFT_TO_TORCH else "ATen ops"
    used = "in use: NLPKERNELS_CUDA=1" if _ops.USES_CUDA_KERNELS else f"not in use: {others} serve CUDA tensors"
    cuda = f"{built_for}, {used}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none visible"
    facts = {
        "nlpkernels": _own_version(),
        "torch": f"{torch.__version__} (built with {_built.TORCH})",
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "compiler": _ops.COMPILER,
        "CPU kernels": f"{picked} (built: {', '.join(built)})",
        "threads": str(torch.get_num_threads()),
        "CUDA": cuda,
        "GPU": gpu,
    }
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")


if __name__ == "__main__":
    main()
