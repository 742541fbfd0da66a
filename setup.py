"""Package map and the optional compiled extension; everything else is in pyproject.toml.

Each op folder kernels/<family>/ installs as kdcmae_fast.kernels.<family>, so nothing lands in
site-packages under the generic name `kernels`. The extension kdcmae_fast._C is an accelerator,
never a requirement: without a compiler (or without torch at build time) the install is pure Python.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

FAMILIES = find_packages("kernels")


def notice(message: str) -> None:
    print(f"kdcmae_fast: {message}", file=sys.stderr)


def cpu_extension():
    """(ext_modules, cmdclass) of kdcmae_fast._C, or empty ones with one line saying why."""
    if os.environ.get("KDCMAE_BUILD_EXT", "1") == "0":
        notice("pure-Python install (KDCMAE_BUILD_EXT=0); ops use impl='torch' or 'triton'")
        return [], {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        notice(
            "pure-Python install: torch is not importable while building; for the C++ ops install "
            "torch first and then `pip install --no-build-isolation .`"
        )
        return [], {}
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        notice(f"pure-Python install: no C++ compiler ({compiler!r} not found; set CXX)")
        return [], {}

    class OptionalBuild(BuildExtension):
        """A compiler that fails costs the C++ ops, not the install."""

        def build_extension(self, ext):
            try:
                super().build_extension(ext)
            except Exception as error:
                ext.optional = True
                notice(f"pure-Python install: building {ext.name} failed ({error})")
                raise

        def copy_extensions_to_source(self):
            built = [e for e in self.extensions if Path(self.get_ext_fullpath(e.name)).exists()]
            self.extensions, kept = built, self.extensions
            super().copy_extensions_to_source()
            self.extensions = kept

    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
    sources += sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
    extension = CppExtension(
        "kdcmae_fast._C",
        sources,
        # No -ffast-math: it switches denormals off for the whole host process.
        extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-std=c++17"],
        extra_link_args=["-fopenmp"],
        depends=[str(path) for path in Path("csrc").rglob("*.h")],
        optional=True,
    )
    return [extension], {"build_ext": OptionalBuild.with_options(no_python_abi_suffix=False)}


EXT_MODULES, CMDCLASS = cpu_extension()

setup(
    packages=find_packages(include=["kdcmae_fast", "kdcmae_fast.*"])
    + [f"kdcmae_fast.kernels.{family}" for family in FAMILIES],
    package_dir={
        f"kdcmae_fast.kernels.{family}": f"kernels/{family.replace('.', '/')}"
        for family in FAMILIES
    },
    package_data={"kdcmae_fast": ["py.typed"]},
    ext_modules=EXT_MODULES,
    cmdclass=CMDCLASS,
)
