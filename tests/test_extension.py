"""kdcmae_fast._C: built where it can be, done without where it cannot."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kdcmae_fast.kernels import complementary_masks
from kdcmae_fast.kernels.common import dispatch

ROOT = Path(__file__).parents[1]
COMPILER = shlex.split(os.environ.get("CXX", "c++"))[0]


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler {COMPILER!r}")
def test_the_extension_is_built():
    """Otherwise every C++ test would be skipped without a word."""
    problem = dispatch.unavailable("complementary_masks", "cpp", "cpu")
    assert problem is None, problem
    assert torch._C._dispatch_has_kernel_for_dispatch_key("kdcmae_fast::mask_plan_cpp", "CPU")


def test_asking_for_cpp_without_the_extension_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "kdcmae_fast._C", None)
    dispatch.extension_problem.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"_C is not built .* `pip install .*` builds it"):
            complementary_masks(torch.arange(2), (7, 7), 0.75, impl="cpp")
    finally:
        dispatch.extension_problem.cache_clear()


def test_an_extension_of_other_sources_is_not_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "kdcmae_fast._C", ModuleType("kdcmae_fast._C"))
    dispatch.extension_problem.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"built from other sources .* builds it anew"):
            complementary_masks(torch.arange(2), (7, 7), 0.75, impl="cpp")
    finally:
        dispatch.extension_problem.cache_clear()


def broken_compiler(folder: Path) -> dict[str, str]:
    """A compiler that knows its version and nothing else."""
    script = folder / "cxx"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *--version*|*-dumpfullversion*) exec c++ "$@";; esac\nexit 1\n'
    )
    script.chmod(0o755)
    return {"CXX": str(script)}


def no_torch(folder: Path) -> dict[str, str]:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise ImportError('not here')\n")
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    "environment, reason",
    [
        (lambda folder: {"CXX": "/nonexistent"}, "no compiler '/nonexistent'"),
        (broken_compiler, "compiling failed"),
        (no_torch, "torch is missing here"),
        (lambda folder: {"KDCMAE_BUILD_EXT": "0"}, "KDCMAE_BUILD_EXT=0"),
    ],
    ids=["no-compiler", "broken-compiler", "no-torch", "not-wanted"],
)
def test_what_cannot_be_built_is_left_out_in_one_line(environment, reason, tmp_path):
    variables = {**os.environ, "KDCMAE_BUILD_EXT": "1", **environment(tmp_path)}
    build = tmp_path / "build"
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "build_ext"]
    done = subprocess.run(
        [*command, "-b", build, "-t", build],
        cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith("kdcmae_fast:")]
    assert len(ours) == 1 and "pure-Python install, no C++ ops" in ours[0] and reason in ours[0]
    assert not list(build.rglob("*.so"))
