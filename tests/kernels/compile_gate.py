"""Compile Triton launches for one NVIDIA architecture, without a GPU, and print what came out.

    python compile_gate.py ARCH     # 80, 90, 100

compile_cases/<family>.py holds `CASES`: name -> (launch, expectations of test_compile_gate.py).
`launch()` calls a family's own launcher with meta tensors; what it launches is compiled instead of
run, so block sizes, warps and pointer alignment are the ones of production. Prints one JSON object
per kernel.

One process per architecture: Triton's cache in memory does not look at the target.
"""

import collections
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class NoGpu:
    """As much of a driver as compiling needs."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(launch: Callable[[], None]) -> list[tuple[str, Any]]:
    """(kernel name, compiled kernel) for every launch in `launch`."""
    compiled = []
    original = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        compiled.append((self.__name__, original(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = run
    try:
        launch()
    finally:
        JITFunction.run = original
    return compiled


def inspect(cubin: bytes) -> dict[str, Any]:
    """Resources and instruction counts of one kernel's machine code."""

    def tool(name: str, *options: str) -> str:
        command = [TOOLS / name, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage")
        code = tool("nvdisasm", "-c", "-ndf")  # no analysis of the data flow
    # A line of code: /*0010*/ @P0 LDG.E.128 R4, ...
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code)
    counts = collections.Counter(names)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": sum(n for name, n in counts.items() if name.split(".")[0] in ("LDL", "STL")),
        "instructions": dict(counts),
    }


def main(arch: int) -> None:
    os.nice(5)
    driver.set_active(NoGpu(arch))
    for file in sorted((Path(__file__).parent / "compile_cases").glob("*.py")):
        for case, (launch, _) in runpy.run_path(str(file))["CASES"].items():
            for kernel, compiled in compile_launches(launch):
                row = {"case": case, "kernel": kernel, "shared": compiled.metadata.shared}
                print(json.dumps(row | inspect(compiled.asm["cubin"])), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
