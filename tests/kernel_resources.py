"""What each CUDA kernel of the library takes: registers, shared memory, and memory of its own beside the registers.

python tests/kernel_resources.py LIBRARY      exits with 1 if a kernel spills or keeps an array outside of registers
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def cuobjdump() -> str:
    """The toolkit's own, or the one that comes with Triton."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    if (triton := find_spec("triton")) and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = shutil.which("cuobjdump") or next((str(f / "cuobjdump") for f in folders if (f / "cuobjdump").exists()), "")
    return found or sys.exit("kernel_resources: no cuobjdump, neither in CUDA_HOME nor with Triton")


def resources(library: str) -> dict[str, dict[str, dict[str, int]]]:
    """Of each kernel, for each architecture."""
    text = subprocess.run([cuobjdump(), "-res-usage", library], check=True, capture_output=True, text=True).stdout
    text = subprocess.run(["c++filt"], input=text, check=True, capture_output=True, text=True).stdout
    found: dict[str, dict[str, dict[str, int]]] = {}
    arch = kernel = ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r" Function (?:void )?(.*):$", line):
            kernel = re.sub(r"nlpkernels::|\(anonymous namespace\)::|c10::|\(.*\)$", "", match[1])
        elif "REG:" in line:
            facts = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
            found.setdefault(kernel, {})[arch] = facts
    return found


def main(library: str) -> int:
    """Prints a line for each kernel; registers for each architecture."""
    found = resources(library)
    archs = sorted({arch for facts in found.values() for arch in facts})
    if not found:
        sys.exit(f"kernel_resources: {library} has no kernels")
    width = max(map(len, found))
    print(f"{'kernel':{width}}  {'registers of ' + ', '.join(archs):24}  shared  local")
    bad = 0
    for kernel, facts in sorted(found.items()):
        registers = ", ".join(str(facts[arch]["REG"]) if arch in facts else "-" for arch in archs)
        shared = max(fact["SHARED"] for fact in facts.values())
        local = max(fact["STACK"] + fact["LOCAL"] for fact in facts.values())
        bad += local > 0
        print(f"{kernel:{width}}  {registers:24}  {shared:6}  {local:5}")
    print(f"{len(found)} kernels for {', '.join(archs)}; with local memory (spills, or arrays): {bad}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
