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
import tempfile
from pathlib import Path
from typing import NoReturn

# ninja may be installed beside a Python whose environment is not activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
CXX = shlex.split(os.environ.setdefault("CXX", "c++"))  # for the linker too, where Python names another


def knows(flags: list[str], source: str = "") -> bool:
    """Whether the compiler takes them, and compiles this with them."""
    try:
        command = [*CXX, *flags, "-fsyntax-only", "-x", "c++", "-"]
        return subprocess.run(command, input=source.encode(), capture_output=True).returncode == 0
    except OSError:  # there is none, which check_tools says
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
if only := os.environ.get("NLPKERNELS_BUILD_CPU"):  # for a check of something else: "default,avx2"
    OF_BFLOAT16 = {name: flags for name, flags in OF_BFLOAT16.items() if name in only.split(",")}
    wanted = [*only.split(","), *(["avx512"] if OF_BFLOAT16 else [])]
    INSTRUCTION_SETS = {name: flags for name, flags in INSTRUCTION_SETS.items() if name in wanted}

OPTIMISE = ["-O3", "-g0", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]  # the last two are torch's headers'
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []  # without it at::parallel_for runs serially
LAST = shlex.split(os.environ.get("NLPKERNELS_CXXFLAGS", ""))  # for the compiler and the linker, after all others
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"  # for a machine that has a toolkit but no GPU

VERSION = "0.1.0"
OLDEST_TORCH, OLDEST_SETUPTOOLS = (2, 10), (77, 0)

# --- What can be missing: each ends in one line, with what helps ------------------------------------------------------

AN_INSTALL = Path(sys.argv[0]).name != "setup.py"  # by pip or uv, of a folder, an archive or a repository
THE_SAME = "the same command again" + (" with --no-build-isolation" if AN_INSTALL else "")
PIP = "uv pip" if "UV" in os.environ else "pip"
HOW_TO_INSTALL = f"{PIP} install 'torch>=2.10' ninja 'setuptools>=77', then {THE_SAME}"
PYTHON = "python{}.{}".format(*sys.version_info)
GXX = "install g++ (Debian, Ubuntu) or gcc-c++ (Fedora)"


def stop(told: str) -> NoReturn:
    """End with one line."""
    sys.exit(f"nlpkernels: {told}")


def check_folder() -> None:
    """Can files be put here?"""
    try:
        tempfile.TemporaryFile(dir=".").close()
    except OSError:
        stop(f"{Path.cwd()} cannot be written to, and is where the build puts its files: install from a copy of it")


def check_tools() -> None:
    """Is all there that pip does not bring?"""
    if not shutil.which(CXX[0]):
        stop(f"no C++ compiler ({CXX[0]} not found): {GXX}, or set CXX")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        stop(f"no Python.h for {sys.executable}: install {PYTHON}-dev (Debian, Ubuntu) or {PYTHON}-devel (Fedora)")
    if OPENMP and not knows(OPENMP, "#include <omp.h>"):
        stop(f"{CXX[0]} has no OpenMP (omp.h): {GXX} and set CXX=g++")
    if not INSTRUCTION_SETS:
        stop(f"NLPKERNELS_BUILD_CPU is {only!r}, which names no instruction set of this machine: {platform.machine()}")


def check_packages() -> None:
    """Are setuptools and torch there, and new enough, and is ninja?"""
    for module, oldest in ((setuptools, OLDEST_SETUPTOOLS), (torch, OLDEST_TORCH)):
        if tuple(map(int, module.__version__.split(".")[:2])) < oldest:
            stop(f"{module.__name__} {module.__version__} is too old: {HOW_TO_INSTALL}")
    if not is_ninja_available():
        print(f"nlpkernels: no ninja, so one file is compiled at a time: {PIP} install ninja", file=sys.stderr)


def check_openmp() -> None:
    """Does the compiler bring the OpenMP that torch has? Two in one process are a fault, and each starts threads."""
    maps = Path("/proc/self/maps")
    torch_has_gnu = maps.exists() and "/libgomp" in maps.read_text()
    if OPENMP and torch_has_gnu and not knows([], "#ifdef __clang__\n#error\n#endif"):
        stop(f"{CXX[0]} is Clang, whose OpenMP would be a second one beside torch's, GCC's: {GXX} and set CXX=g++")


IS_SDIST = "sdist" in sys.argv or sys.argv[1:2] == ["egg_info"]  # which need neither torch nor a compiler
check_folder()
if not IS_SDIST:
    check_tools()
if sys.argv[1:] == ["check_tools"]:  # the Makefile asks, before it downloads anything
    sys.exit()
try:
    import setuptools

    if IS_SDIST:
        setuptools.setup(version=VERSION, install_requires=["torch>={}.{}".format(*OLDEST_TORCH), "numpy"])
        sys.exit()
    import torch
    from torch.utils.cpp_extension import is_ninja_available
except ModuleNotFoundError as missing:
    stop(f"no {missing.name} here, and the build needs the torch that the package will run with: {HOW_TO_INSTALL}")
check_packages()
check_openmp()

from setuptools.errors import CompileError, LinkError  # noqa: E402
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
        stop(f"FORCE_CUDA=1, but {missing}")
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
        try:
            super().run()
        except (RuntimeError, CompileError, LinkError) as error:
            what = " ".join(str(error).split()) or "a compiler failed"
            stop(f"{what}: see above; where one was killed, memory was short: set MAX_JOBS=1, for one file at a time")
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
        files = ", ".join(Path(source).name for source in ext.sources)
        number = f"library {self.extensions.index(ext) + 1} of {len(self.extensions)}"
        print(f"nlpkernels: {number}, {ext.name.split('.')[1]}: {files}", file=sys.stderr, flush=True)
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
