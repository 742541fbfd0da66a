"""Axes, curves and heat maps against plain computation."""

import base64
import json
import math
import random
import re
import struct
import zlib

import pytest

from kdcmae_fast.report.charts import Logged, Series, chart, charts
from kdcmae_fast.report.confusion import confusion
from kdcmae_fast.report.log import Log
from kdcmae_fast.report.reading import Unreadable
from kdcmae_fast.report.scale import running_mean, step_scale, thin, value_scale, write_tick


def curve_of(count: int, seed: int = 0) -> list[tuple[float, float]]:
    generator = random.Random(seed)
    return [(float(step), generator.uniform(1, 5)) for step in range(count)]


@pytest.mark.parametrize("count", [0, 1, 79])
def test_short_logs_are_drawn_as_they_are(count):
    assert running_mean(curve_of(count)) is None


@pytest.mark.parametrize("count", [80, 81, 333, 4000])
def test_running_mean(count):
    curve = curve_of(count)
    means = running_mean(curve)
    assert [step for step, _ in means] == [step for step, _ in curve]
    wide = count // 40
    for place, (_, mean) in enumerate(means):
        after = wide if place > wide else max(place, wide // 8)
        near = [value for _, value in curve[max(0, place - wide) : place + after + 1]]
        assert mean == pytest.approx(sum(near) / len(near))


@pytest.mark.parametrize("count", [1, 600, 601, 100_000])
def test_thinning_keeps_extremes_and_order(count):
    curve = curve_of(count)
    curve[count // 2] = (curve[count // 2][0], 99.0)
    kept = thin(curve)
    assert len(kept) <= 600 and set(kept) <= set(curve) and kept == sorted(kept)
    values = [value for _, value in kept]
    assert max(values) == 99.0 and min(values) == min(value for _, value in curve)


@pytest.mark.parametrize(
    "values",
    [
        [1.0], [0.0], [-3.0, -3.0], [1e-30], [2.0, 2.0 + 1e-15], [1e29, -1e29], [0.0, 1e-29],
        [1e-29, 1e29], [3.0, 10.0], [0.5, 50.0], [0.0, 5.0], [-1.0, 1.0], [9.7, 9.8],
        [1.6, 2.4], [0.74, 0.9], [1.01, 1.99],
    ],
)  # fmt: skip
def test_every_scale_holds_its_values_and_has_ticks(values):
    for linear in (False, True):
        scale = value_scale(values, linear=linear)
        assert all(-1e-9 <= scale.at(value) <= 1 + 1e-9 for value in values)
        ticks = scale.ticks(4)
        assert (2 if scale.log else 3) <= len(ticks) <= 8 and ticks == sorted(ticks)
        assert all(-1e-6 <= scale.at(tick) <= 1 + 1e-6 for tick in ticks)
        assert all(len(write_tick(tick)) <= 10 for tick in ticks)


def test_values_that_differ_much_are_on_a_log_scale():
    assert value_scale([0.5, 50.0]).log
    assert not value_scale([5.0, 50.0]).log
    assert not value_scale([0.0, 50.0]).log
    assert not value_scale([0.5, 50.0], linear=True).log


def test_steps():
    assert step_scale([1.0, 600.0])[:2] == (0.0, 600.0)
    assert step_scale([500.0, 600.0])[:2] == (500.0, 600.0)
    assert step_scale([7.0])[:2] == (7.0, 8.0)


def test_a_chart_draws_the_values_where_they_are():
    drawn = chart("Total loss", [Series("a", 0, [(0.0, 0.0), (50.0, 10.0), (100.0, 5.0)])])
    (path,) = re.findall(r'<path d="([^"]*)" class="line s0"', drawn)
    points = [tuple(map(float, point.split())) for point in path[1:].split("L")]
    assert [x for x, _ in points] == [0, 500, 1000]
    top = 10.6  # 6 % above the largest
    assert [y for _, y in points] == pytest.approx(
        [1000, 1000 - 10000 / top, 1000 - 5000 / top], abs=0.1
    )
    assert 'aria-label="Total loss over 100 steps. a: 0 → 5"' in drawn
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', drawn)
    assert json.loads(data)["series"][0]["points"] == [[0, 0], [50, 10], [100, 5]]


def test_losses_come_first_and_the_unknown_last():
    names = ("zeal", "lr", "kd", "total", "seconds_left", "epoch", "clips_per_second")
    log = Log({name: [(1.0, 1.0), (2.0, 2.0)] for name in names})
    titles = re.findall(r"<figcaption><b>(.*?)</b>", charts([Logged("a", 0, log)]))
    expected = ["Total loss", "Self-distillation", "Learning rate", "Clips per second", "zeal"]
    assert titles == expected


def test_runs_keep_their_colours_where_one_has_no_such_curve():
    one, two = Log({"total": [(1.0, 1.0)]}), Log({"total": [(1.0, 2.0)], "kd": [(1.0, 3.0)]})
    drawn = charts([Logged("a", 0, one), Logged("b", 1, two)])
    assert re.findall(r'class="line (s\d)"', drawn) == ["s0", "s1", "s1"]


MATRIX = [[8, 1, 1], [0, 9, 1], [2, 1, 7]]


def test_a_confusion_matrix():
    drawn = confusion(MATRIX, ["dog", "drum", "<rain>"])
    assert "24 of 30 clips are on the diagonal" in drawn and "&lt;rain&gt;" in drawn
    shares = [float(share) for share in re.findall(r"--share:([\d.]+)", drawn)]
    expected = [cell / sum(row) for row in MATRIX for cell in row if cell]
    assert shares == pytest.approx(expected, abs=1e-3)
    assert 'title="dog, taken for drum: 1 (10%)"' in drawn


def test_a_large_confusion_matrix_is_a_picture():
    size = 60
    matrix = [[int(row == column) * 4 for column in range(size)] for row in range(size)]
    matrix[3][7] = 2
    drawn = confusion(matrix, None)
    (address,) = re.findall(r'src="data:image/png;base64,([^"]+)"', drawn)
    body = base64.b64decode(address)
    assert struct.unpack(">II", body[16:24]) == (size, size)
    start = body.index(b"IDAT")
    (length,) = struct.unpack(">I", body[start - 4 : start])
    rows = zlib.decompress(body[start + 4 : start + 4 + length])
    pixel = [
        rows[row * (3 * size + 1) + 1 + 3 * column] for row, column in ((0, 0), (0, 1), (3, 7))
    ]
    assert pixel[0] == 18 and pixel[1] == 246  # red of the dark and of the light end
    assert pixel[2] == round(246 - 228 * math.sqrt(2 / 6))
    assert '<th scope="row">3</th><td>7</td><td>2</td>' in drawn


@pytest.mark.parametrize(
    ("matrix", "names"),
    [
        ([], None), ("x", None), ([[1, 2]], None), ([[1, 2], [3]], None), ([[1, -2], [3, 4]], None),
        ([[1, "2"], [3, 4]], None), ([[1, math.nan], [3, 4]], None), ([[math.inf]], None),
        ([[1, 2], [3, 4]], ["a"]), ([[1, 2], [3, 4]], "ab"), ([[True]], None),
    ],
)  # fmt: skip
def test_what_is_no_confusion_matrix(matrix, names):
    with pytest.raises(Unreadable, match="confusion"):
        confusion(matrix, names)
