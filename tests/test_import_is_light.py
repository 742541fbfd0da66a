"""What importing the package costs, and what it must not do; each in a fresh interpreter."""

import json
import os
import subprocess
import sys

import pytest

HEAVY = ("deepspeed", "triton", "torchaudio", "torchvision", "timm", "matplotlib", "pandas")


def run_python(code: str, *options: str) -> str:
    """Standard output of `code`; anything on stderr, warnings included, fails."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_kernels_import_nothing_heavy_and_say_nothing():
    code = f"""
import sys, torch
import torch.cuda as cuda
before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
import kdcmae_fast.kernels
assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
assert not cuda.is_initialized()
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
"""
    assert run_python(code, "-W", "error") == ""


def test_package_imports_nothing():
    code = "import sys; import kdcmae_fast; assert 'torch' not in sys.modules"
    assert run_python(code, "-W", "error") == ""


def test_command_line_help_needs_no_torch():
    code = """
import contextlib, sys
from kdcmae_fast.cli import main
with contextlib.suppress(SystemExit):
    main(["--help"])
assert "torch" not in sys.modules
"""
    assert "retrieve" in run_python(code)


def test_kernels_add_little_to_the_import_of_torch():
    # Processor time of one process, so that neither a slow nor a busy machine matters; the least of
    # some runs, since caches do. torch._dynamo alone would be as much again as torch.
    code = """
import json, time
start = time.process_time()
import torch
torch_is_there = time.process_time()
import kdcmae_fast.kernels
print(json.dumps((time.process_time() - torch_is_there) / (torch_is_there - start)))
"""
    shares = []
    for _ in range(5):
        shares.append(json.loads(run_python(code)))
        if shares[-1] < 0.2:
            return
    pytest.fail(f"share of torch's own import: {shares}")


@pytest.mark.skipif(os.name != "posix", reason="needs a shell's environment")
def test_kernels_import_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from kdcmae_fast.kernels import info_nce
info_nce(torch.randn(4, 8), torch.randn(4, 8))
"""
    assert run_python(code, "-W", "error") == ""
