"""benchmarks/gpu_run.sh, as far as it can be held to something without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_run.sh"
NOT_ON_A_GPU = {"data", "data_memory"}  # loaders, on the CPU
NEED_PYDANTIC = {"retrieval", "step"}  # the script asks for it first


def ordered() -> list[str]:
    """The files of the stage `ops`, without `test_` and `.py`."""
    (names,) = re.findall(r"order=\((.*?)\)", SCRIPT.read_text(), re.DOTALL)
    return names.split()


def test_every_benchmark_has_its_place():
    files = {path.stem.removeprefix("test_") for path in SCRIPT.parent.glob("test_*.py")}
    assert len(set(ordered())) == len(ordered())
    assert files == {*ordered(), *NEED_PYDANTIC, *NOT_ON_A_GPU}
    assert all(f"benchmarks/test_{name}.py" in SCRIPT.read_text() for name in NEED_PYDANTIC)


def test_the_ops_are_collected_without_pydantic(tmp_path):
    """One file that does not import would end a session; a bare machine has no pydantic."""
    (tmp_path / "pydantic.py").write_text("raise ImportError('not installed')")
    files = [f"benchmarks/test_{name}.py" for name in ordered()]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [*command, *files], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert "test_gather_tokens" in done.stdout


def test_an_unknown_stage_is_refused():
    done = subprocess.run(["bash", SCRIPT, "tiem"], capture_output=True, text=True)
    wanted = "error: stage tiem is not one of all, verify, ops, step, report\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", wanted)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_gradients_are_asked_for_where_the_output_is(dtype, value_and_grads):
    """The fixture behind the error budgets; "meta" stands for the GPU."""
    x = torch.ones(3, 2, device="meta", dtype=dtype)
    y, grad = value_and_grads(lambda x: 2 * x, (x,))
    assert y.device == grad.device == x.device
