"""Errors as one line: what is left of them, where they come from, the exit code."""

import re
import sys
from pathlib import Path

import pytest

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data import ClipError, TooManyBadClips, open_dataset
from kdcmae_fast.data.prepare import make_settings, prepare
from kdcmae_fast.messages import (
    EXTRAS,
    Parser,
    ToldElsewhere,
    UsageError,
    one_line,
    report_error,
    require_folder,
)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("lr=0:\n  bad"), "lr=0: bad"),
        (ValueError(), "ValueError (--debug shows where)"),
        (KeyError("x"), "KeyError: 'x' (--debug shows where)"),
        (RuntimeError("odd"), "RuntimeError: odd (--debug shows where)"),
        (FileNotFoundError(2, "No such file", "a.yaml"), "a.yaml: No such file"),
        (FileNotFoundError("--checkpoint x is no folder"), "--checkpoint x is no folder"),
        (ModuleNotFoundError("plots need Matplotlib"), "plots need Matplotlib"),
        (
            ModuleNotFoundError("No module named 'tqdm'", name="tqdm"),
            "No module named 'tqdm'; `pip install kdcmae-fast[train]`",
        ),
        (ModuleNotFoundError("No module named 'x'", name="x"), "No module named 'x'"),
        (TooManyBadClips("2 bad clips"), "2 bad clips"),
        (ClipError("a.mp4", "no audio"), "a.mp4: no audio"),
    ],
)
def test_one_line(error, line):
    assert one_line(error) == line


def test_what_the_first_process_tells_is_not_cut_off(capsys, monkeypatch):
    """A launcher ends all processes when one has ended: the others stay until the first told it."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    assert report_error(ToldElsewhere(), debug=True) == 1
    assert waited[0] >= 1 and capsys.readouterr().err == ""


def test_ranks_and_exit_codes(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert report_error(ValueError("bad"), debug=False) == 1
    monkeypatch.setenv("RANK", "3")
    assert report_error(ValueError("bad"), debug=True) == 1
    assert report_error(KeyboardInterrupt(), debug=False) == 130
    first, *traceback, last, interrupted = capsys.readouterr().err.splitlines()
    assert (first, last, interrupted) == ("error: bad", "error on rank 3: bad", "interrupted")
    assert traceback == ["ValueError: bad"]  # it was never raised: no frames


def test_output_is_checked_before_work(tmp_path):
    require_folder(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--output .*/file/x: .*/file is a file; give a folder"):
        require_folder(tmp_path / "file" / "x")


@pytest.mark.parametrize("source, package", [("folder", "av"), ("sounds", "soundfile")])
def test_clips_are_not_called_damaged_where_nothing_can_read_them(monkeypatch, source, package):
    monkeypatch.setitem(sys.modules, package, None)
    data = DataConfig(source=source, path="nowhere")
    with pytest.raises(ModuleNotFoundError, match=rf"{source} needs .* {package}; .*\[data\]`"):
        open_dataset(data, ModelConfig(), seed=0)
    with pytest.raises(ModuleNotFoundError, match=rf"kdcmae prepare needs .* {package}; "):
        prepare(["nowhere"], "nowhere", make_settings("cav_mae"))


def test_every_extra_has_its_packages():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    called = {"PIL": "pillow", "sklearn": "scikit-learn"}
    for package, extra in EXTRAS.items():
        (listed,) = re.findall(rf"^{extra} = \[(.*)\]$", text, re.MULTILINE)
        assert f'"{called.get(package, package)}' in listed


def test_usage_errors_name_the_help():
    with pytest.raises(UsageError, match=r"unrecognized arguments: --x \(see prog --help\)"):
        Parser(prog="prog").parse_args(["--x"])
