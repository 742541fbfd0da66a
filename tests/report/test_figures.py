"""How figures are written, which is the better, and how any JSON is shown."""

import pytest

from kdcmae_fast.report.figures import better, label, show, write_number, write_value


@pytest.mark.parametrize(
    ("value", "name", "written"),
    [
        (0.69, "R@1", "69.0 %"), (1, "accuracy", "100.0 %"), (1 / 3, "chance", "33.3 %"),
        (50.5, "median_rank", "50.5"), (1.0, "median_rank", "1"), (0.475, "error", "0.475"),
        (38400, "samples", "38,400"), (172.2126, "clips", "172.2"), (3.0, "x", "3"),
        (0.000123, "lr", "0.000123"), (0.06, "x", "0.060"), (0.0437, "x", "0.044"),
        (12345678.9, "x", "1.23e+07"), (0.0, "x", "0"),
        (float("nan"), "x", "not a number"), (float("-inf"), "x", "−∞"), (10**400, "x", "∞"),
        (-0.62, "x", "-0.620"), (1234.5, "x", "1,234"), (2.5, "accuracy", "2.500"),
    ],
)  # fmt: skip
def test_numbers(value, name, written):
    assert write_number(value, name) == written


def test_values():
    assert [write_value(value) for value in (None, True, False, "a", 2)] == [
        "–", "yes", "no", "a", "2",
    ]  # fmt: skip


def test_labels():
    assert label("audio_to_video") == label("audio->video") == "audio → video"
    assert label("median_rank") == "median rank" and label("mean_ciou") == "mean cIoU"


@pytest.mark.parametrize(
    ("name", "sign"),
    [
        ("accuracy", 1), ("R@1 audio->video", 1), ("mAP", 1), ("cIoU", 1), ("AUC", 1),
        ("d-prime", 1), ("error, video", -1), ("median rank", -1), ("total loss", -1), ("MedR", -1),
        ("chance", 0), ("cIoU centred disc", 0), ("num_clips", 0), ("steps", 0),
        ("clips per second", 0),
    ],
)  # fmt: skip
def test_which_is_better(name, sign):
    assert better(name) == sign


def test_objects_that_are_alike_become_one_table():
    shown = show(
        {
            "audio_to_video": {"R@1": 0.69, "mrr": 0.8, "tied": 0},
            "ties": "average",
            "chance": {"R@1": 0.01, "mrr": 0.05},
            "speed": {"seconds": 3.0},
        }
    )
    assert shown.count("<table>") == 2
    assert '<th scope="row">audio → video</th><td>69.0 %</td><td>0.800</td><td>0</td>' in shown
    assert '<th scope="row">chance</th><td>1.0 %</td><td>0.050</td><td></td>' in shown
    assert "<dt>ties</dt><dd>average</dd>" in shown


def test_lists_and_nests():
    rows = [{"fold": fold, "accuracy": 0.5} for fold in range(60)]
    deep = {"a": {"b": {"c": {"d": {"e": [1, {"f": 2}]}}}}}
    shown = show({"folds": rows, "grid": [0.1, 1.0], "empty": [], **deep, "long": list(range(500))})
    assert "folds (the first 50 of 60)" in shown and shown.count('<th scope="row">') == 50
    assert "<dt>empty</dt><dd>none</dd>" in shown
    assert "<pre>" in shown and "&quot;f&quot;: 2" in shown


def test_rows_that_hold_more_than_plain_values():
    shown = show({"folds": [{"accuracy": 0.5, "curve": [{"C": 1}]}, {"accuracy": 0.6, "odd": 2}]})
    assert '<th scope="row">50.0 %</th><td>–</td>' in shown
    assert "folds, whole" in shown and "&quot;C&quot;: 1" in shown


def test_a_table_keeps_its_name_and_loses_rows_of_nothing():
    audio = {"model": {"loss": 0.8, "shown": 7.0}, "mean": {"loss": 1.1, "shown": None}}
    video = {"model": {"loss": None, "shown": None}}
    shown = show({"errors": {"audio": audio, "video": video}})
    assert "<h4>errors</h4>" in shown and "<caption>audio</caption>" in shown
    assert '<th scope="row">mean</th><td>1.1</td><td>–</td>' in shown.replace("1.100", "1.1")
    assert "video" not in shown
