"""Triton kernels on any machine, and work that goes on beside the other tests.

A test marked `triton` takes the fixture `triton_device` and calls ops with impl="triton" on it.
With a GPU it runs in place. Without one it runs in Triton's interpreter, which has to be switched
on before Triton is imported: all marked tests run in one pytest process of their own, in the
background from the end of collection on. They come last here, and each passes or fails as it did
there.

The interpreter costs milliseconds per program and computes bf16 arithmetic wrongly: toy shapes,
fp32 or fp64.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kdcmae_fast.kernels.common import unavailable

HERE = Path(__file__).parent
COMPILE_TIMEOUT = 600  # seconds for all cases; a kernel that spills badly can take a minute
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TIMEOUT = 300  # seconds without another result
REPORT = "KDCMAE_TEST_REPORT"  # environment variable: where the interpreter process reports
# glibc aborts at the free of a block that was written before or past its ends, and fills what it
# hands out. Where there is no such library, the loader ignores its name (and says so).
GUARDED_MEMORY = {
    "LD_PRELOAD": "libc_malloc_debug.so.0",
    "GLIBC_TUNABLES": "glibc.malloc.check=3:glibc.malloc.perturb=90",
}
COMPILE_GATE = pytest.StashKey["CompileGate"]()
INTERPRETER = pytest.StashKey["Interpreter"]()
PROBLEMS: list[str] = []  # of the test that runs


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "triton: runs Triton kernels, on a GPU or interpreted")
    config.addinivalue_line("markers", "compiled: asks what the compile gate found")
    if REPORT in os.environ:
        os.nice(5)


@pytest.fixture(scope="session")
def guarded_memory() -> dict[str, str]:
    """The environment of a process whose allocator checks and fills its blocks."""
    return {**os.environ, **GUARDED_MEMORY}


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


class CompileGate:
    """compile_gate.py for some architectures, all at once."""

    def __init__(self, arches: set[int]) -> None:
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.processes: dict[int, subprocess.Popen] = {}
        self.found: dict[int, list[dict]] = {}
        environment = {**os.environ, "TRITON_CACHE_DIR": self.folder.name}
        environment.pop("TRITON_INTERPRET", None)
        for arch in arches:
            command = [sys.executable, HERE / "compile_gate.py", str(arch)]
            with self.file(arch, "out").open("w") as out, self.file(arch, "err").open("w") as err:
                process = subprocess.Popen(command, env=environment, stdout=out, stderr=err)
            self.processes[arch] = process

    def file(self, arch: int, suffix: str) -> Path:
        return Path(self.folder.name, f"{arch}.{suffix}")

    def rows(self, arch: int) -> list[dict]:
        """One row per kernel of every case; waits for the compiler."""
        if arch not in self.found:
            returncode = self.processes[arch].wait(COMPILE_TIMEOUT)
            assert returncode == 0, self.file(arch, "err").read_text()[-4000:]
            lines = self.file(arch, "out").read_text().splitlines()
            self.found[arch] = [json.loads(line) for line in lines]
        return self.found[arch]

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        self.folder.cleanup()


class Interpreter:
    """The marked tests in a pytest process with TRITON_INTERPRET=1, which reports line by line."""

    def __init__(self, node_ids: list[str], root: Path) -> None:
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.report, self.output = Path(self.folder.name, "report"), Path(self.folder.name, "out")
        self.report.touch()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                   f"--rootdir={root}", *node_ids]  # fmt: skip
        environment = {**os.environ, **GUARDED_MEMORY, "TRITON_INTERPRET": "1",
                       REPORT: str(self.report)}  # fmt: skip
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=root, env=environment, stdout=output, stderr=output
            )

    def outcome(self, node_id: str) -> str | None:
        """None for a test that passed there, else what went wrong; waits for it."""
        while True:
            running = self.process.poll() is None
            lines = self.report.read_text().rpartition("\n")[0].splitlines()  # whole ones
            outcomes = dict(json.loads(line) for line in lines)
            if node_id in outcomes:
                return outcomes[node_id]
            if not running:
                return f"the test did not run\n{self.output.read_text()[-4000:]}"
            if time.time() > self.report.stat().st_mtime + TIMEOUT:
                return f"nothing for {TIMEOUT} s, last was {lines[-1:]}"
            time.sleep(0.1)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that wait for something in the background come last."""
    items.sort(key=lambda item: any(map(item.get_closest_marker, ("triton", "compiled"))))


def pytest_collection_finish(session: pytest.Session) -> None:
    if INTERPRETED or session.config.option.collectonly or not importlib.util.find_spec("triton"):
        return
    marked, compiled = (
        [item for item in session.items if item.get_closest_marker(name)]
        for name in ("triton", "compiled")
    )
    stash = session.config.stash
    if compiled:
        stash[COMPILE_GATE] = CompileGate({item.callspec.params["arch"] for item in compiled})
    if marked and not torch.cuda.is_available():
        stash[INTERPRETER] = Interpreter([item.nodeid for item in marked], session.config.rootpath)


def pytest_unconfigure(config: pytest.Config) -> None:
    for key in (COMPILE_GATE, INTERPRETER):
        if key in config.stash:
            config.stash[key].stop()


@pytest.fixture(scope="session")
def compiled(pytestconfig: pytest.Config) -> Callable[[int], list[dict]]:
    """compiled(arch): what every case of compile_cases/ compiles to for this architecture."""
    if COMPILE_GATE not in pytestconfig.stash:
        pytest.skip("Triton is not installed")
    return pytestconfig.stash[COMPILE_GATE].rows


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Replace the call of a marked test by what became of it in the interpreter process."""
    if INTERPRETED or torch.cuda.is_available() or not pyfuncitem.get_closest_marker("triton"):
        return None
    if INTERPRETER not in pyfuncitem.config.stash:
        pytest.skip("Triton is not installed")
    problem = pyfuncitem.config.stash[INTERPRETER].outcome(pyfuncitem.nodeid)
    if problem is not None:
        pytest.fail(f"with TRITON_INTERPRET=1: {problem}", pytrace=False)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the interpreter process: a line per test; a skipped one has not run, a problem."""
    if REPORT not in os.environ:
        return
    if not report.passed:
        PROBLEMS.append(f"{report.outcome} in {report.when}: {report.longreprtext}")
    if report.when == "teardown":
        with open(os.environ[REPORT], "a") as file:
            print(json.dumps([report.nodeid, "\n".join(PROBLEMS) or None]), file=file)
        PROBLEMS.clear()
