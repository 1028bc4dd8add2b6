"""The optional compiled part: one library, the kernels compiled once for each instruction set.

Needs a C++17 compiler (g++ or clang++) and no PyTorch. Without a compiler the install goes on, and sparse layers run as
dense PyTorch operators. In place, for development: ``python setup.py build_ext --inplace``.
"""

import hashlib
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("pruning/kernels/csrc")
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-ffp-contract=fast"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mprefer-vector-width=512"]


class BuildKernels(build_ext):
    """Compiles one source several times and links a plain shared library."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library is loaded by path, not imported, so its name holds no Python version."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, extension: Extension) -> None:
        """Compile for every instruction set of this architecture, and link."""
        flags_by_set = {"portable": []}
        if platform.machine() in ("x86_64", "AMD64"):
            flags_by_set |= {"avx2": AVX2, "avx512": AVX512}
        # `pruning.kernels.native` compares it with the sources beside the library: another layout would give nonsense.
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]*")))).hexdigest()
        objects = self._compile("dispatch.cpp", "dispatch", [*FLAGS, f'-DSECATEUR_SOURCES="{digest}"'])
        for name, flags in flags_by_set.items():
            objects += self._compile("instruction_set.cpp", name, [*FLAGS, f"-DSECATEUR_NAME={name}", *flags])
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(extension.name), target_lang="c++")

    def _compile(self, source: str, name: str, flags: list[str]) -> list[str]:
        folder = str(Path(self.build_temp) / name)
        return self.compiler.compile([str(SOURCES / source)], output_dir=folder, extra_postargs=flags)


setup(
    # `BuildKernels` compiles the sources; optional, so that a failure is reported and the install goes on.
    ext_modules=[
        Extension("pruning.kernels._native", sorted(map(str, SOURCES.glob("*.cpp"))), language="c++", optional=True)
    ],
    cmdclass={"build_ext": BuildKernels},
)
