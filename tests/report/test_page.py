"""The page as text: what is on it, what may not be, and what is said of bad input."""

import copy
import json
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import kdcmae_fast.report
from kdcmae_fast.cli import main
from kdcmae_fast.report import write_report


class Page(HTMLParser):
    """Elements of a page, its text, and whether every element is closed."""

    VOID = {"meta", "img", "br", "input", "link"}

    def __init__(self, path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("script", "style"):
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page(tmp_path):
    """page(*runs, **options) -> the page on them, read."""

    def write(*runs, **options) -> Page:
        return Page(write_report(runs, tmp_path / "report.html", **options))

    return write


def test_one_run(page, make_run):
    shown = page(make_run())
    for said in (
        "kdc_mae, preset tiny", "0123456789abcdef", "torch 2.13.0", "19,200", "Processes 2",
        "One clip was left out", "the file ends early", "203.0 clips per second",
        "Parameters 10", "4,000 synthetic", "Total loss", "Learning rate", "Clips per second",
        "Probe", "Retrieval", "Sound localisation", "Inpainting", "Reconstructions",
        "Weigh the soul", "grams", "MacDougall", "24 of 30 clips", "Its pair is found at rank 2",
    ):  # fmt: skip
        assert said in shown.text, said
    assert "best" not in shown.text and "compared" not in shown.text
    assert len(shown.all("img")) == 8 + 6 + 1 + 1 and len(shown.all("audio")) == 8 + 1


def test_everything_is_inside_the_page(page, make_run, tmp_path):
    shown = page(make_run())
    for tag in ("img", "audio"):
        assert all(item["src"].startswith("data:") for item in shown.all(tag))
    assert not shown.all("link") and not any("src" in script for script in shown.all("script"))
    body = re.sub(r'"data:[^"]*"', "", (tmp_path / "report.html").read_text())
    assert "http://" not in body and "https://" not in body and "@import" not in body


def test_accessible(page, make_run):
    shown = page(make_run(), make_run("second"))
    assert all(image.get("alt") for image in shown.all("img"))
    assert all(audio.get("aria-label") for audio in shown.all("audio"))
    assert all(cell.get("scope") for cell in shown.all("th"))
    ids = [attributes["id"] for _, attributes in shown.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    links = [link["href"][1:] for link in shown.all("a")]
    assert set(links) <= set(ids) and len(links) > 15
    assert shown.all("html") == [{"lang": "en"}]


def row(text: str, name: str) -> str:
    return re.search(rf"{re.escape(name)} (.{{0,40}})", text).group(1)


def test_two_runs_are_compared(page, make_run):
    shown = page(
        make_run(floor=3.0),
        make_run("second", floor=2.5, steps=600, recall=0.81, accuracy=0.75, lr=0.001),
    )
    text = shown.text
    assert "2 runs compared" in text and "first , second" in text
    assert row(text, "samples").startswith("19,200 38,400")
    assert row(text, "total loss").startswith("3 best 2.500")
    assert row(text, "self-distillation loss").startswith("0.010 0.010")
    assert row(text, "accuracy").startswith("best 80.0 % 75.0 %")
    assert row(text, "R@1 audio → video").startswith("69.0 % best 81.0 %")
    assert row(text, "R@1 chance").startswith("1.0 % 1.0 %")
    assert row(text, "optim.lr").startswith("0.002 0.001")
    assert "mask_ratio" not in row(text, "Settings that differ")


def test_what_is_measured_differently_has_no_best(page, make_run, tmp_path):
    runs = make_run(), make_run("second", recall=0.81, floor=2.0)
    path = runs[1] / "retrieval" / "metrics.json"
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps({**metrics, "num_clips": 1000}))
    path = runs[1] / "config.json"
    config = json.loads(path.read_text())
    config["config"]["model"]["mask_ratio"] = 0.5
    path.write_text(json.dumps(config))
    text = page(*runs).text
    assert row(text, "R@1 audio → video").startswith("69.0 % 81.0 %")
    assert "measured on different clips or otherwise: no best is marked" in text
    assert row(text, "total loss").startswith("3 2")
    assert "the models or their data differ: no best is marked" in text


def test_a_run_without_an_evaluation_that_another_has(page, make_run):
    second = make_run("second")
    (second / "probe" / "metrics.json").unlink()
    assert row(page(make_run(), second).text, "accuracy").startswith("80.0 % –")


HOSTILE = "<script>document.title='x'</script><img src=x onerror=alert(1)>\"' \u202e\ud800"


def spoiled(value, said):
    """The same with `said` for every text that is no file name and no key of ours."""
    if isinstance(value, dict):
        kept = ("command", "file", "frame", "sound", "picture", "direction")
        return {
            key: entry if key in kept else spoiled(entry, said) for key, entry in value.items()
        } | {f"new {said}": said}
    if isinstance(value, list):
        return [spoiled(entry, said) for entry in value]
    return said if isinstance(value, str) else value


def test_what_files_say_is_text(page, make_run, tmp_path):
    runs = [make_run("<img src=x onerror=alert(1)>'\""), make_run("b & <b>")]
    for run in runs:
        for path in (run / "config.json", *run.glob("**/metrics.json")):
            path.write_text(json.dumps(spoiled(json.loads(path.read_text()), HOSTILE)))
        lines = (run / "log.jsonl").read_text().replace("grad_norm", "</script><b onclick=x>")
        (run / "log.jsonl").write_text(lines)
    strange = {"command": HOSTILE, "headline": {HOSTILE: 1.0}, "pictures": [HOSTILE]}
    (runs[0] / "later" / "metrics.json").write_text(json.dumps(strange))
    shown = page(*runs)
    scripts = shown.all("script")
    assert [script for script in scripts if script.get("type") != "application/json"] == [{}]
    for tag, attributes in shown.elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert tag not in ("iframe", "object", "embed", "form", "base", "svg:script")
    assert all(item["src"].startswith("data:image/png") for item in shown.all("img"))
    assert "<script>document.title" in shown.text and "</script><b onclick=x>" in shown.text


def test_files_that_are_missing_or_damaged_are_named(page, make_run, tmp_path):
    run = make_run()
    (run / "inpainting" / "0.png").unlink()
    (run / "inpainting" / "1.png").write_text("no picture")
    (run / "inpainting" / "rebuilt.wav").write_bytes(b"RIFF\xff\xff\x00\x00WAVE")
    (run / "retrieval" / "examples" / "2.wav").unlink()
    (run / "probe" / "metrics.json").write_text('{"command": "probe", "conf')
    (run / "later" / "metrics.json").write_text('{"no": "command"}')
    (run / "config.json").write_text("[]")
    (run / "reconstructions" / "metrics.json").write_text(
        json.dumps({"command": "reconstruct", "pictures": [{"file": "../../secret.png"}]})
    )
    text = page(run).text
    for said in (
        "inpainting/0.png is missing",
        "inpainting/1.png is no picture that browsers show",
        "inpainting/rebuilt.wav is cut short",
        "retrieval/examples/2.wav is missing",
        "probe/metrics.json is not JSON",
        'later/metrics.json has no "command"',
        "config.json holds no JSON object",
        "reconstructions/../../secret.png is refused: it is outside of the run's folder",
    ):
        assert said in text, said
    assert "kdc_mae, preset tiny" in text  # from metrics.json


STRANGE = (
    None,
    True,
    "x",
    -1,
    1e400,
    float("nan"),
    [],
    {},
    [[]],
    {"a": {"b": []}},
    [None, {"x": 1}],
)


def places(value, path=()):
    """Paths of all that is inside of a JSON value."""
    found = []
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in entries:
        found.append((*path, key))
        if isinstance(entry, dict | list):
            found += places(entry, (*path, key))
    return found


def test_no_metrics_can_break_the_page(make_run, tmp_path):
    run = make_run(steps=30)
    choose = random.Random(0)
    files = [run / "config.json", *sorted(run.glob("**/metrics.json"))]
    for path in files:
        whole = json.loads(path.read_text())
        found = places(whole)
        for place in choose.sample(found, min(len(found), 15)):
            spoiled = copy.deepcopy(whole)
            *above, last = place
            inner = spoiled
            for key in above:
                inner = inner[key]
            inner[last] = choose.choice(STRANGE)
            path.write_text(json.dumps(spoiled))
            write_report([run], tmp_path / "report.html")
        path.write_text(json.dumps(whole))


def test_sounds_of_a_clip_are_below_its_picture(page, make_run, tmp_path):
    folder = make_run() / "inpainting"
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["clips"] = [
        {"clip": "clip 0", "picture": "0.png", "sounds": ["rebuilt.wav", "rebuilt.wav"]},
        {"clip": "clip 9", "picture": "5.png", "sounds": []},
    ]
    metrics["sounds"][0]["title"] = "clip 0: reconstructed"
    del metrics["pictures"][5]  # named by its clip alone
    (folder / "metrics.json").write_text(json.dumps(metrics))
    shown = page(folder)
    assert len(shown.all("img")) == 6
    assert [audio["aria-label"] for audio in shown.all("audio")] == ["reconstructed"] * 2
    assert "clip 0 reconstructed reconstructed clip 1" in shown.text and "clip 9" in shown.text


def test_evaluations_of_one_kind_are_told_apart_by_their_folders(page, make_run):
    first, second = make_run(), make_run("second", accuracy=0.9)
    shutil.copytree(first / "probe", first / "probe_knn")
    text = page(first, second).text
    assert "Probe (probe)" in text and "Probe (probe_knn)" in text
    assert row(text, "Probe, probe accuracy").startswith("80.0 % best 90.0 %")
    assert row(text, "Probe, probe_knn accuracy").startswith("80.0 % –")


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_from_their_ground(theme):
    """WCAG 2.2: contrast of 4.5 for text, 3 for lines."""
    style = Path(kdcmae_fast.report.__file__).with_name("style.css").read_text()
    root = re.findall(r":root \{(.*?)\}", style, re.S)[theme]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", root))
    for name, least in {
        "ink": 4.5, "soft": 4.5, "accent": 4.5, "good": 4.5, "warn": 4.5,
        **{f"c{place}": 3.0 for place in range(6)},
    }.items():  # fmt: skip
        for ground in ("paper", "sheet"):
            pair = sorted(luminance(colours[which]) + 0.05 for which in (name, ground))
            assert pair[1] / pair[0] >= least, (name, ground)


def test_an_unfinished_run_says_so(page, make_run):
    run = make_run(steps=120)
    (run / "metrics.json").unlink()
    text = page(run).text
    assert "120 of 300 (not finished: no metrics.json)" in text and "203" in text


def test_a_run_of_evaluations_alone(page, make_run, tmp_path):
    make_run()
    text = page(tmp_path / "first" / "retrieval").text
    assert "Retrieval" in text and "Training" not in text


def test_large_files_are_linked(page, make_run, tmp_path):
    shown = page(make_run(), max_megabytes=0)
    sources = {item["src"] for item in (*shown.all("img"), *shown.all("audio"))}
    assert all((tmp_path / source).is_file() for source in sources)
    assert "first/retrieval/examples/1.png" in sources
    assert "15 more" in shown.text and "--max-megabytes" in shown.text


def test_the_page_replaces_an_older_one(make_run, tmp_path):
    run = make_run()
    assert write_report([run], tmp_path) == tmp_path / "report.html"
    before = (tmp_path / "report.html").stat().st_ino
    assert write_report([str(run)], str(tmp_path / "new" / "a.html")) == tmp_path / "new" / "a.html"
    write_report([run], tmp_path)
    assert (tmp_path / "report.html").stat().st_ino != before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_it_needs_neither_torch_nor_matplotlib():
    code = (
        "import sys, kdcmae_fast.report; print({'torch', 'matplotlib', 'numpy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_command_line(make_run, tmp_path, capsys):
    output = tmp_path / "out.html"
    assert main(["report", str(make_run()), str(make_run("second")), "--output", str(output)]) == 0
    assert f"wrote {output}" in capsys.readouterr().out and output.is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["RUN", "--output", "page.pdf"], "give a file ending in .html"),
        (["nowhere"], "nowhere does not exist"),
        (["."], "is no run"),
        (["RUN", "RUN"], "named twice"),
        (["RUN", "--max-megabytes", "-1"], "below 0"),
        (["RUN", "--max-megabytes", "nan"], "below 0"),
        (["RUN", "--output", "file/report.html"], "is a file"),
        ([], "RUN"),
    ],
)
def test_bad_input_is_one_line(arguments, said, make_run, tmp_path, monkeypatch, capsys):
    run = make_run()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file").write_text("")
    monkeypatch.chdir(tmp_path / "empty")
    given = [str(run) if argument == "RUN" else argument for argument in arguments]
    assert main(["report", *given]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and said in error
    assert not list((tmp_path / "empty").glob("*.html"))
