"""Triton kernels on any machine.

A test marked `triton` takes the fixture `triton_device` and calls ops with impl="triton" on it.
With a GPU it runs in place. Without one it runs in Triton's interpreter, which has to be switched
on before Triton is imported: the marked tests of a file run together in one pytest process of
their own, and each test here passes or fails as it did there.

The interpreter costs milliseconds per program and computes bf16 arithmetic wrongly: toy shapes,
fp32 or fp64.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kdcmae_fast.kernels.common import unavailable

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TIMEOUT = 300  # seconds for the marked tests of one file
RESULTS = pytest.StashKey[dict[Path, dict[str, str | None]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "triton: runs Triton kernels, on a GPU or interpreted")


@pytest.fixture(scope="session")
def triton_device() -> str:
    """Device type for the operands of impl="triton"."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(scope="module", params=("torch", "cpp"))
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """What impl="auto" takes: each test of a file that uses this runs with every one.

    OP, in the file, names the op that must have the implementation.
    """
    problem = unavailable(request.module.OP, request.param, "cpu")
    if problem:
        pytest.skip(problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCMAE_IMPL", request.param)
        # Makes at::empty, too, hand out memory filled with NaN.
        torch.use_deterministic_algorithms(request.param == "cpp")
        yield request.param
        torch.use_deterministic_algorithms(False)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Replace the call of a marked test by what became of it in the interpreter process."""
    if INTERPRETED or torch.cuda.is_available() or not pyfuncitem.get_closest_marker("triton"):
        return None
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    results = pyfuncitem.config.stash.setdefault(RESULTS, {})
    if pyfuncitem.path not in results:
        marked = [
            item.nodeid
            for item in pyfuncitem.session.items
            if item.path == pyfuncitem.path and item.get_closest_marker("triton")
        ]
        results[pyfuncitem.path] = interpret(marked, pyfuncitem.config.rootpath)
    problem = results[pyfuncitem.path].get(pyfuncitem.name, "the test did not run")
    if problem is not None:
        pytest.fail(f"with TRITON_INTERPRET=1: {problem}", pytrace=False)
    return True


def interpret(node_ids: list[str], root: Path) -> dict[str, str | None]:
    """Run these tests with the interpreter: test name -> None (passed) or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                   f"--junitxml={report}", f"--rootdir={root}", *node_ids]  # fmt: skip
        done = subprocess.run(
            command, cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True, text=True, timeout=TIMEOUT,
        )  # fmt: skip
        if not report.exists():
            pytest.fail(f"no report from the interpreter process:\n{done.stdout}{done.stderr}")
        cases = ET.parse(report).getroot().iter("testcase")
        return {case.attrib["name"]: outcome(case) for case in cases}


def outcome(case: ET.Element) -> str | None:
    """None for a test that ran and passed; a skipped one has not run, which is a problem."""
    problems = [child for child in case if child.tag in ("failure", "error", "skipped")]
    return "\n".join(f"{child.tag}: {child.text}" for child in problems) or None
