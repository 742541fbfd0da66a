"""Every Triton kernel compiles for the GPUs we name, and its machine code is what we expect.

No GPU needed. compile_cases/<family>.py holds CASES: name -> (launch, expectations), where
`launch()` calls the family's launcher with meta tensors and the expectations are, per kernel:
`registers`, the most per thread, `contains`, instructions (or how they begin) that must occur,
`contains_90` and the like, those of one architecture, and `lacks`, those that must not. Stack use
and spills are never accepted.
"""

import ast
import functools
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"
FILES = sorted((HERE / "compile_cases").glob("*.py"))
ARCHES = (80, 90, 100)
KNOWN = {"registers", "contains", "lacks", *(f"contains_{arch}" for arch in ARCHES)}
TIMEOUT = 480  # seconds per architecture; a kernel that spills badly can compile for a minute

CASES = {name: case for file in FILES for name, case in runpy.run_path(str(file))["CASES"].items()}

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@functools.cache
def compiled_for(arch: int, cache: Path) -> list[dict]:
    """One row per compiled kernel of every case."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, HERE / "compile_gate.py", str(arch), *FILES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_triton
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", ARCHES)
def test_machine_code(arch, case, tmp_path_factory):
    rows = compiled_for(arch, tmp_path_factory.getbasetemp() / "triton")
    rows = [row for row in rows if row["case"] == case]
    expectations = CASES[case][1]
    assert {row["kernel"] for row in rows} == set(expectations)
    for row in rows:
        expected = expectations[row["kernel"]]
        assert set(expected) <= KNOWN, f"{row['kernel']}: nobody reads {set(expected) - KNOWN}"
        assert row["registers"] <= expected["registers"], row
        assert row["stack"] == row["spills"] == 0, row
        for name in expected.get("contains", []) + expected.get(f"contains_{arch}", []):
            found = any(each.startswith(name) for each in row["instructions"])
            assert found, f"no {name} in {row}"
        for name in expected.get("lacks", []):
            assert not any(each.startswith(name) for each in row["instructions"]), row


def test_every_kernel_has_a_case():
    kernels = {
        node.name
        for file in KERNELS.glob("*/kernel*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert kernels, "no kernels found"
    assert kernels == {name for _, expected in CASES.values() for name in expected}
