"""Where numbers come from: versions and commit, to stand beside them."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

from kdcmae_fast import __version__

PACKAGES = ("torch", "deepspeed", "triton", "numpy", "av", "soundfile")


def versions() -> dict[str, str]:
    """Python, this package, and what matters to its numbers; absent packages are left out."""
    found = {"python": platform.python_version(), "kdcmae_fast": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the checkout this package runs from (+ "-dirty"); None outside of one."""
    checkout = Path(__file__).resolve().parents[2]
    if _git(checkout, "rev-parse", "--show-toplevel") != str(checkout):
        return None
    commit = _git(checkout, "rev-parse", "HEAD")
    dirty = _git(checkout, "status", "--porcelain", "-uno")
    return f"{commit}-dirty" if dirty else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
