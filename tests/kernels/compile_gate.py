"""Compile Triton launches for one NVIDIA architecture, without a GPU, and print what came out.

    python compile_gate.py ARCH CASES.py...     # ARCH: 80, 90, 100

Each CASES.py holds `CASES`: name -> Case-like dict, see test_compile_gate.py. Its `launch` calls a
family's own launcher with meta tensors; launches are compiled instead of run, so block sizes, warps
and pointer alignment are the ones of production. One JSON object per line and kernel: case, kernel,
registers, stack, shared, spills, and the machine code's instructions with their counts.

One process per architecture: Triton's cache in memory does not look at the target.
"""

import collections
import json
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
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

    map_python_to_cpp_type = CudaDriver.map_python_to_cpp_type


def compile_launches(launch) -> list[tuple[str, object]]:
    """Call `launch`; (kernel name, compiled kernel) for every launch in it."""
    compiled = []
    original = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.__name__, kernel))
        return kernel

    JITFunction.run = run
    try:
        launch()
    finally:
        JITFunction.run = original
    return compiled


def tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def inspect(cubin: bytes) -> dict[str, object]:
    """Resources and instruction counts of one kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        code = tool("nvdisasm", "-c", file.name)
    # A line of code: /*0010*/ @P0 LDG.E.128 R4, ...
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code)
    counts = collections.Counter(names)
    spills = sum(count for name, count in counts.items() if re.match(r"(LDL|STL)\b", name))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": spills,
        "instructions": dict(counts),
    }


def main(arch: int, files: list[str]) -> None:
    driver.set_active(NoGpu(arch))
    for file in files:
        for case, expectation in runpy.run_path(file)["CASES"].items():
            for kernel, compiled in compile_launches(expectation["launch"]):
                row = {"case": case, "kernel": kernel, "shared": compiled.metadata.shared}
                print(json.dumps(row | inspect(compiled.asm["cubin"])), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
