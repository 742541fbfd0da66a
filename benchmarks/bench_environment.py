"""What a row needs to be comparable with another."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

SEED = 0
ROOT = Path(__file__).parents[1]
STARTED = datetime.now(timezone.utc).isoformat(timespec="seconds")


def environment() -> dict[str, object]:
    """Source, versions and machine of this session; `run` names the session."""
    commit, dirty = source()
    on_cuda = torch.cuda.is_available()
    facts = {
        "run": STARTED,
        "date": STARTED[:10],
        "commit": commit,
        "dirty": dirty,
        "seed": SEED,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if on_cuda else cpu_name(),
        "threads": torch.get_num_threads(),
    }
    if on_cuda:
        facts |= {"cuda": torch.version.cuda, **gpu_state()}
    return facts


def cpu_name() -> str:
    """The processor's own name, where pytest-benchmark brought what reads it."""
    try:
        from cpuinfo import get_cpu_info
    except ImportError:
        return platform.processor() or platform.machine()
    return get_cpu_info()["brand_raw"]


def source() -> tuple[str, bool | None]:
    """(commit, whether tracked files differ from it); KDCMAE_COMMIT names it where git cannot."""
    commit = _output("git", "rev-parse", "--short", "HEAD")
    if not commit:
        return os.environ.get("KDCMAE_COMMIT", "unknown"), None
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".",
                      ":!benchmarks/results")  # fmt: skip
    return commit, bool(changed)


def version(package: str) -> str | None:
    """The installed version, None without the package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu_state() -> dict[str, object]:
    """Driver, clocks in MHz (now and at most) and power limit in W, where nvidia-smi tells."""
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    line = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    names = ("driver", "sm_mhz", "sm_mhz_max", "memory_mhz", "power_limit_w")
    values = [value.strip() for value in line.splitlines()[0].split(",")] if line else []
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def _output(*command: str) -> str:
    """Standard output of a command, empty where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
