"""The C++ ops write inside their buffers and read nothing they have not written.

Their tests run once more with glibc's checking allocator, which aborts when a block that was
written past its ends is freed and fills what it hands out with garbage. (The Triton tests always
run with it in the interpreter: conftest.py.)
"""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("test_*.py"))
TESTS = "strides or own_error or error_budget or empty or sizes or tiles"
SLOW = "kdc_tiled and (257 or 1023 or 768)"  # of the same code as the other variants
OVERRUN = """
import ctypes, torch
x = torch.empty(100)
ctypes.memset(x.data_ptr(), 1, 401)
del x
"""


def test_of_the_c_plus_plus_ops_at_odd_sizes(guarded_memory):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments], env=guarded_memory, capture_output=True, text=True,
            timeout=600,
        )  # fmt: skip

    if run("-c", OVERRUN).returncode == 0:
        pytest.skip("this machine has no libc_malloc_debug.so.0")
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, FILES)]
    done = run(*command, "-k", f"cpp and not triton and ({TESTS}) and not ({SLOW})")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
