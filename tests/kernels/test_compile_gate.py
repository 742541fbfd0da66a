"""Every Triton kernel compiles for the GPUs we name, and its machine code is what we expect.

No GPU needed. compile_cases/<family>.py holds CASES: name -> (launch, expectations), where
`launch()` calls the family's launcher with meta tensors and the expectations are, per kernel:
`registers`, the most per thread, `contains`, instructions (or how they begin) that must occur,
`contains_90` and the like, those of one architecture, and `lacks`, those that must not. Stack use
and spills are never accepted, nor more shared memory than there is.
"""

import ast
import runpy
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"
FILES = sorted((HERE / "compile_cases").glob("*.py"))
ARCHES = (80, 90, 100)
SHARED = {80: 163, 90: 227, 100: 227}  # KiB that one program may take; more fails at the launch
KNOWN = {"registers", "contains", "lacks", *(f"contains_{arch}" for arch in ARCHES)}

CASES = {name: case for file in FILES for name, case in runpy.run_path(str(file))["CASES"].items()}


@pytest.mark.compiled
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", ARCHES)
def test_machine_code(arch, case, compiled):
    rows = [row for row in compiled(arch) if row["case"] == case]
    expectations = CASES[case][1]
    assert {row["kernel"] for row in rows} == set(expectations)
    for row in rows:
        expected = expectations[row["kernel"]]
        assert set(expected) <= KNOWN, f"{row['kernel']}: nobody reads {set(expected) - KNOWN}"
        assert row["registers"] <= expected["registers"], row
        assert row["stack"] == row["spills"] == 0, row
        assert row["shared"] <= SHARED[arch] * 1024, row
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
