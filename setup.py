"""Package map and the optional compiled extension; everything else is in pyproject.toml.

Each op folder kernels/<family>/ installs as kdcmae_fast.kernels.<family>, so nothing lands in
site-packages under the generic name `kernels`; the recipes in configs/ install as
kdcmae_fast/configs/ in the same way. The extension kdcmae_fast._C is an accelerator,
never a requirement: without a compiler (or without torch at build time) the install is pure Python.

KDCMAE_BUILD_EXT=0 leaves the extension out. CXX chooses the compiler.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

FAMILIES = find_packages("kernels")


def pure_python(reason: str) -> None:
    print(f"kdcmae_fast: pure-Python install, no C++ ops: {reason}", file=sys.stderr)


def cuda_objects(folder: str) -> tuple[list[str], list[str]]:
    """Objects of csrc/cuda/*.cu and the linker options they need; empty ones without CUDA.

    The sources are plain CUDA (raw pointers and a stream, no torch headers), so nvcc is called
    directly: seconds instead of a minute, and any toolkit will do. csrc/cuda/*.cpp binds them.
    """
    import torch

    sources, nvcc = sorted(Path("csrc/cuda").glob("*.cu")), shutil.which("nvcc")
    if not sources or nvcc is None or torch.version.cuda is None:
        return [], []
    objects = []
    for source in sources:
        objects.append(str(Path(folder, source.stem + ".cu.o")))
        command = [nvcc, "-c", "-O3", "-std=c++17", "-arch=all-major", "-Xcompiler=-fPIC"]
        subprocess.run([*command, str(source), "-o", objects[-1]], check=True)
    toolkit = os.environ.get("CUDA_HOME") or Path(nvcc).resolve().parents[1]
    return objects, [f"-L{toolkit}/lib64", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]


def extension():
    """(ext_modules, cmdclass) of kdcmae_fast._C, or empty ones with one line saying why."""
    if os.environ.get("KDCMAE_BUILD_EXT", "1") == "0":
        pure_python("KDCMAE_BUILD_EXT=0")
        return [], {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        pure_python("torch is missing here; install it, then `pip install --no-build-isolation .`")
        return [], {}
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(shlex.split(compiler)[0]) is None:
        pure_python(f"no compiler {compiler!r}; install one or set CXX")
        return [], {}

    class OptionalBuild(BuildExtension):
        """A compiler that fails costs the C++ ops, not the install."""

        def run(self):
            inplace = self.inplace
            try:
                Path(self.build_temp).mkdir(parents=True, exist_ok=True)
                module = self.extensions[0]
                module.extra_objects, options = cuda_objects(self.build_temp)
                if module.extra_objects:
                    module.sources += map(str, sorted(Path("csrc/cuda").glob("*.cpp")))
                    module.extra_link_args += options
                super().run()
            except (Exception, SystemExit) as error:
                pure_python(f"compiling failed, {str(error).splitlines()[0]} (see above)")
                # Nothing was built, so nothing is to be copied or packed.
                self.extensions, self.inplace = [], inplace

    sources = [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")]
    module = CppExtension(
        "kdcmae_fast._C",
        sorted(str(path) for path in sources),
        # No -ffast-math: it switches denormals off for the whole host process.
        extra_compile_args=["-O3", "-g0", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden"],
        extra_link_args=["-fopenmp"],
        depends=[str(path) for path in Path("csrc").rglob("*.h")],
    )
    return [module], {"build_ext": OptionalBuild}


EXT_MODULES, CMDCLASS = extension()

setup(
    packages=find_packages(include=["kdcmae_fast", "kdcmae_fast.*"])
    + [f"kdcmae_fast.kernels.{family}" for family in FAMILIES]
    + ["kdcmae_fast.configs"],
    package_dir={"kdcmae_fast.configs": "configs"}
    | {
        f"kdcmae_fast.kernels.{family}": f"kernels/{family.replace('.', '/')}"
        for family in FAMILIES
    },
    package_data={
        "kdcmae_fast": ["py.typed"],
        "kdcmae_fast.configs": ["*.yaml", "*.json"],
        "kdcmae_fast.report": ["*.css", "*.js"],
    },
    ext_modules=EXT_MODULES,
    cmdclass=CMDCLASS,
)
