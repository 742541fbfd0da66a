"""The wheel: every op once, nothing under a generic name, other projects' `kernels` untouched."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAMILIES = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py"))
CONFIGS = {
    f"kdcmae_fast/configs/{path.name}"
    for kind in ("yaml", "json")
    for path in (ROOT / "configs").glob(f"*.{kind}")
}
NOT_SHIPPED = {"kernels", "csrc", "tests", "benchmarks", "configs"}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output and error of a command that must succeed."""
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked part of the tree."""
    skip = shutil.ignore_patterns(
        ".*", "*.so", "*.egg-info", "__pycache__", "build", "dist", "runs", "golden"
    )
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "source", ignore=skip))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pure-Python wheel of it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q"]
    command += ["--disable-pip-version-check", "-w", str(folder), str(source)]
    run(*command, cwd=folder, KDCMAE_BUILD_EXT="0")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for site-packages: the wheel, beside another project's `kernels`."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("OWNER = 'somebody else'\n")
    (site / "kernels" / "masking").mkdir()
    (site / "kernels" / "masking" / "__init__.py").write_text("raise ImportError('not ours')\n")
    return site


def test_every_op_family_is_in_the_wheel_once(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for family in FAMILIES:
        copies = [name for name in names if name.endswith(f"/{family}/__init__.py")]
        assert copies == [f"kdcmae_fast/kernels/{family}/__init__.py"]
    assert "kdcmae_fast/kernels/__init__.py" in names
    assert "kdcmae_fast/py.typed" in names
    assert {"kdcmae_fast/report/style.css", "kdcmae_fast/report/page.js"} <= set(names)
    assert {name for name in names if name.startswith("kdcmae_fast/configs/")} == CONFIGS
    (scripts,) = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
    assert b"kdcmae = kdcmae_fast.cli:main" in zipfile.ZipFile(wheel).read(scripts)


def test_nothing_lands_at_top_level_but_the_package(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert not tops & NOT_SHIPPED
    assert {top for top in tops if not top.endswith(".dist-info")} == {"kdcmae_fast"}


def test_source_distribution_has_what_a_build_needs_and_no_part_of_the_test_suite(source, tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path]
    run(*command, cwd=source, KDCMAE_BUILD_EXT="0")
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    folders = ("configs", "csrc", "docs", "kdcmae_fast", "kernels")
    wanted = {path for folder in folders for path in (source / folder).rglob("*")}
    assert {str(path.relative_to(source)) for path in wanted if path.is_file()} <= names
    made = {"PKG-INFO", "setup.cfg", "kdcmae_fast.egg-info"}
    beside = {name.split("/")[0] for name in names} - {*folders, *made}
    assert beside == {"LICENSE", "CHANGELOG.md", "MANIFEST.in", "README.md", "constraints.txt"} | {
        "pyproject.toml",
        "setup.py",
    }


def test_an_install_has_the_recipes_that_the_pages_name(installed, tmp_path):
    code = (
        "from kdcmae_fast.config_file import CONFIGS, load_config;"
        f"assert str(CONFIGS) == {str(installed / 'kdcmae_fast/configs')!r}, CONFIGS;"
        "assert load_config('configs/demo.yaml').name == 'kdc_mae'"
    )
    run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))


def test_another_projects_kernels_stays_importable(installed, tmp_path):
    code = (
        "import kernels, kdcmae_fast.kernels as ours;"
        "assert kernels.OWNER == 'somebody else';"
        f"assert ours.__file__.startswith({str(installed)!r}), ours.__file__;"
        f"assert {str(installed / 'kernels')!r} not in list(ours.__path__);"
        "import kdcmae_fast.kernels.masking"
    )
    run(sys.executable, "-W", "error", "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))


def test_script_form_keeps_other_projects_kernels_and_the_standard_library(tmp_path):
    # The launcher runs `python kdcmae_fast/pretrain.py`, which puts that folder first on sys.path.
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("OWNER = 'somebody else'\n")
    script = ROOT / "kdcmae_fast" / "pretrain.py"
    code = f"""
import contextlib, io, runpy, sys
sys.path[0] = {str(script.parent)!r}
sys.argv = [{str(script)!r}, "--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    runpy.run_path({str(script)!r}, run_name="__main__")
assert {str(script.parent)!r} not in sys.path, sys.path
import kernels
assert kernels.OWNER == "somebody else", kernels
import kdcmae_fast.kernels
"""
    run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))


def test_ops_are_imported_under_one_name_only(tmp_path):
    # `kernels.masking` beside `kdcmae_fast.kernels.masking` would register every op twice.
    code = (
        "import sys, kdcmae_fast.kernels;"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'kernels']"
    )
    run(sys.executable, "-c", code, cwd=ROOT)
