"""Loss curves from a run's log."""

import json
import struct

import pytest

from kdcmae_fast.evaluation import plots
from kdcmae_fast.evaluation.plots import plot_losses, read_losses


def write_log(path, steps, names=("total", "mae_audio", "mae_video", "contrastive", "kd")):
    records = [
        {"step": step, "lr": 1e-3, **{name: (k + 1) / step for k, name in enumerate(names)}}
        for step in steps
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def drawn(monkeypatch):
    """The figures made, in order."""
    figures = []
    new_figure = plots.new_figure
    monkeypatch.setattr(
        plots, "new_figure", lambda *size: figures.append(new_figure(*size)) or figures[-1]
    )
    return figures


@pytest.mark.parametrize(
    "names",
    [
        ("total", "mae_audio", "mae_video", "contrastive", "kd"),
        ("total", "mae_audio", "mae_video"),
        ("total", "contrastive"),
        ("total",),
        ("mae_audio", "mae_video"),
    ],
)
def test_one_panel_for_each_loss(tmp_path, drawn, names):
    log = write_log(tmp_path / "log.jsonl", range(1, 201), names)
    path = plot_losses(log, tmp_path / "loss.png")
    assert len(drawn[0].axes) == len(names)
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    assert 500 < width < 1600
    assert 400 < height < 700
    assert path.stat().st_size > 5_000


def test_scale_follows_the_range(tmp_path, drawn):
    log = write_log(tmp_path / "log.jsonl", range(1, 101), ("total",))
    plot_losses(log, tmp_path / "loss.png")
    assert drawn[0].axes[0].get_yscale() == "log"  # 1 to 1/100
    log = write_log(tmp_path / "log.jsonl", range(1, 10), ("total",))
    plot_losses(log, tmp_path / "loss.png")
    assert drawn[1].axes[0].get_yscale() == "linear"


def test_a_single_record_and_non_finite_values_are_drawn(tmp_path):
    log = write_log(tmp_path / "log.jsonl", [1])
    plot_losses(log, tmp_path / "loss.png")
    log.write_text('{"step": 1, "total": NaN}\n{"step": 2, "total": 3}\n')
    plot_losses(log, tmp_path / "loss.png")


def test_later_lines_win_and_steps_are_in_order(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"step": 2, "total": 5}\n\n{"step": 1, "total": 4}\n{"note": "x"}\n'
        '{"step": 2, "total": 3}\n{"step": 3, "to'
    )
    assert read_losses(log) == {"total": ([1, 2], [4.0, 3.0])}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no losses"),
        ('{"step": 1, "lr": 2}\n', "holds no losses"),
        ('{"step": 1\n{"step": 2, "total": 1}\n', "line 1 is not JSON"),
    ],
)
def test_bad_logs_are_named(tmp_path, text, message):
    log = tmp_path / "log.jsonl"
    log.write_text(text)
    with pytest.raises(ValueError, match=message):
        plot_losses(log, tmp_path / "loss.png")
