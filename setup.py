"""Build of the compiled libraries. All metadata is in pyproject.toml.

csrc/library.cpp becomes `nlpkernels._C` (schemas and build facts). csrc/cpu is compiled once per instruction set, into
`nlpkernels._cpu_default`, `_cpu_avx2` and `_cpu_avx512`, of which one is loaded at import. Beside the last one,
`_cpu_avx512bf16` or `_cpu_amx` has recurrent layers of bfloat16. csrc/cuda becomes `nlpkernels._cuda` where CUDA is
built (`cuda_wanted`).
"""

from __future__ import annotations

import copy
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

# ninja may be installed beside a Python whose environment is not activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def knows(flags: list[str]) -> bool:
    """Whether the compiler takes them."""
    command = [*shlex.split(os.environ.get("CXX", "c++")), *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:  # there is none, which check_toolchain says
        return False


INSTRUCTION_SETS = {"default": ["-Wno-psabi"]}  # its vectors are passed to inlined functions only
OF_BFLOAT16 = {}  # that add to the last one what they multiply bfloat16 with
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # of GCC's own AVX-512 header
    OF_BFLOAT16["avx512bf16"] = [*INSTRUCTION_SETS["avx512"], "-mavx512bf16"]
    OF_BFLOAT16["amx"] = [*OF_BFLOAT16["avx512bf16"], "-mamx-tile", "-mamx-bf16"]
    OF_BFLOAT16 = {name: flags for name, flags in OF_BFLOAT16.items() if knows(flags)}  # GCC 11 and Clang 12 do
if only := os.environ.get("NLPKERNELS_BUILD_CPU"):  # for a check of something else
    OF_BFLOAT16 = {only: OF_BFLOAT16[only]} if only in OF_BFLOAT16 else {}
    base = "avx512" if OF_BFLOAT16 else only
    INSTRUCTION_SETS = {base: INSTRUCTION_SETS[base]}

OPTIMISE = ["-O3", "-g0", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]  # the last two are torch's headers'
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []  # without it at::parallel_for runs serially
LAST = shlex.split(os.environ.get("NLPKERNELS_CXXFLAGS", ""))  # for the compiler and the linker, after all others
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"  # for a machine that has a toolkit but no GPU


def check_toolchain() -> None:
    """Stop with one line if something outside of pip's reach is missing."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if not shutil.which(compiler):
        sys.exit(
            f"nlpkernels: no C++ compiler ({compiler} not found): "
            "install g++ (Debian, Ubuntu) or gcc-c++ (Fedora), or set CXX"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        sys.exit(
            f"nlpkernels: no Python.h for {sys.executable}: "
            "install python3-dev (Debian, Ubuntu) or python3-devel (Fedora)"
        )


IS_SDIST = "sdist" in sys.argv or sys.argv[1:2] == ["egg_info"]  # which need neither torch nor a compiler
if not IS_SDIST:
    check_toolchain()
if sys.argv[1:] == ["check_toolchain"]:  # the Makefile asks, before it downloads anything
    sys.exit()

VERSION = "0.1.0"
OLDEST_TORCH, OLDEST_SETUPTOOLS = (2, 11), (77, 0)
HOW_TO_INSTALL = "pip install 'torch>=2.11' ninja 'setuptools>=77' && pip install --no-build-isolation ."
try:
    import setuptools

    if IS_SDIST:
        setuptools.setup(version=VERSION, install_requires=["torch>={}.{}".format(*OLDEST_TORCH), "numpy"])
        sys.exit()
    import torch
except ImportError:
    sys.exit(
        f"nlpkernels: building needs the torch that it will run with, which build isolation hides: {HOW_TO_INSTALL}"
    )
for module, oldest in ((setuptools, OLDEST_SETUPTOOLS), (torch, OLDEST_TORCH)):
    if tuple(map(int, module.__version__.split(".")[:2])) < oldest:
        sys.exit(f"nlpkernels: {module.__name__} {module.__version__} is too old: {HOW_TO_INSTALL}")

from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension  # noqa: E402


def cuda_wanted() -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and why: FORCE_CUDA=1 or 0 decides, else whether a GPU is visible."""
    force = os.environ.get("FORCE_CUDA")
    if force == "0":
        return False, "FORCE_CUDA=0"
    missing = None
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is not a CUDA build"
    elif CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").exists():
        missing = "no CUDA toolkit was found; CUDA_HOME names one"
    if missing and force == "1":
        sys.exit(f"nlpkernels: FORCE_CUDA=1, but {missing}")
    if missing:
        return False, missing
    if force == "1":
        return True, "FORCE_CUDA=1"
    if not torch.cuda.is_available():
        return False, "no GPU is visible; FORCE_CUDA=1 builds without one"
    return True, f"found {torch.cuda.get_device_name()}"


def cuda_archs() -> str:
    """Architectures to compile for, in the form of TORCH_CUDA_ARCH_LIST."""
    if given := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return given
    if not torch.cuda.is_available():
        return DEFAULT_CUDA_ARCHS
    capabilities = {torch.cuda.get_device_capability(gpu) for gpu in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(capabilities)) + "+PTX"


def sources(pattern: str) -> list[str]:
    """Files of csrc, in an order that does not depend on the file system."""
    return sorted(str(path) for path in Path("csrc").glob(pattern))


def vectors(instruction_set: str) -> str:
    """What torch's headers call the vectors of an instruction set."""
    return "AVX512" if instruction_set in OF_BFLOAT16 else instruction_set.upper()


def extensions() -> list[CppExtension]:
    """One extension per library."""
    headers = sources("**/*.h") + sources("**/*.cuh")
    flags = OPTIMISE + WARNINGS + OPENMP
    cpu = [
        CppExtension(
            f"nlpkernels._cpu_{name}",
            ["csrc/cpu/recurrent.cpp"] if name in OF_BFLOAT16 else sources("cpu/*.cpp"),
            depends=headers,
            extra_compile_args=[
                *flags,
                f"-DCPU_CAPABILITY={vectors(name)}",
                f"-DCPU_CAPABILITY_{vectors(name)}",
                *instructions,
                *LAST,
            ],
            extra_link_args=OPENMP + LAST,
        )
        for name, instructions in (INSTRUCTION_SETS | OF_BFLOAT16).items()
    ]

    cuda, archs = [], ""
    wanted, why = cuda_wanted()
    cuda_sources = sources("cuda/*.cu")
    if wanted and cuda_sources:
        archs = os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_archs()  # BuildExtension reads it
        # cuBLAS's headers may be missing from a toolkit, but come with pip's torch. The toolkit's own go first.
        beside_torch = [str(path) for path in Path(torch.__path__[0]).parent.glob("nvidia/cu*/include")]
        after = [flag for path in beside_torch for flag in ("-idirafter", path)]
        host_flags = ["-Xcompiler", ",".join(["-fvisibility=hidden", *WARNINGS, *after])]
        cuda.append(
            CUDAExtension(
                "nlpkernels._cuda",
                cuda_sources,
                depends=headers,
                extra_compile_args={"cxx": flags, "nvcc": ["-O3", *host_flags]},
            )
        )
    decision = f"kernels for {archs}" if archs else "no kernels"
    print(f"nlpkernels: CUDA: {decision} ({why if cuda_sources else 'no sources'})", file=sys.stderr)

    library = CppExtension(
        "nlpkernels._C",
        ["csrc/library.cpp"],
        depends=headers,
        define_macros=[("NLPKERNELS_CUDA_ARCHS", f'"{archs}"')],
        extra_compile_args=flags + LAST,
        extra_link_args=LAST,
    )
    return [library, *cpu, *cuda]


class BuildLibraries(BuildExtension):
    """BuildExtension with a folder of objects for each extension, several of which are built side by side."""

    def finalize_options(self) -> None:
        """Give each extension, of two sources or so, two of the processor's cores."""
        super().finalize_options()
        side_by_side = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1) // 2
        if self.use_ninja and side_by_side > 1:  # without ninja, BuildExtension changes the compiler as it goes
            self.parallel = side_by_side

    def run(self) -> None:
        """Build all, and write beside them for which torch."""
        super().run()
        told = (
            f'"""Written by setup.py: what the libraries here were compiled with."""\n\nTORCH = "{torch.__version__}"\n'
        )
        Path(self.get_ext_fullpath("nlpkernels._C")).with_name("_built.py").write_text(told)

    def build_extension(self, ext: CppExtension) -> None:
        """Build one library.

        By default all extensions share one folder, in which a source compiled for one instruction set would pass for
        the same source compiled for another; and an editable install takes a temporary one, so that nothing is reused.
        Each torch has its own, too: environments may stand side by side in one tree.
        """
        command = copy.copy(self)  # the others are being built with theirs
        of = f"{sys.implementation.cache_tag}-torch-{torch.__version__}{'-flags' if LAST else ''}"
        command.build_temp = str(Path("build", of, ext.name))
        super(BuildLibraries, command).build_extension(ext)


# What is built runs with that torch alone, and says so: to pip, and in its name.
TORCH = ".".join(torch.__version__.split(".")[:2])
setuptools.setup(
    version=f"{VERSION}+torch{TORCH}",
    install_requires=[f"torch=={TORCH}.*", "numpy"],
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildLibraries},
)
