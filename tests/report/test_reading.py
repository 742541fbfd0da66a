"""Files of a run: what is read, what is refused, and why."""

import os

import pytest

from kdcmae_fast.report.log import read_log
from kdcmae_fast.report.media import Media, sniff
from kdcmae_fast.report.reading import Unreadable, count_parameters, inside, read_json
from kdcmae_fast.report.run import read_run, read_runs


@pytest.fixture
def run(tmp_path, write_png):
    folder = tmp_path / "run" / "retrieval"
    write_png(folder / "in.png")
    write_png(tmp_path / "run" / "other" / "beside.png")
    write_png(tmp_path / "secret.png")
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["in.png", "./in.png", "../other/beside.png"])
def test_files_inside_of_the_run(run, name):
    assert inside(run, run / "retrieval", name).is_file()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../../secret.png", "outside"),
        ("/etc/passwd", "absolute"),
        ("C:/windows/win.ini", "absolute"),
        ("..", "missing"),
        (".", "missing"),
        ("no.png", "missing"),
        ("", "no file name"),
        (None, "no file name"),
        (["in.png"], "no file name"),
        ("in.png\0.jpg", "no file name"),
        ("x" * 5000, "no file name"),
        ("\ud800", "no file name"),
    ],
)
def test_what_is_refused(run, name, reason):
    with pytest.raises(Unreadable, match=reason):
        inside(run, run / "retrieval", name)


def test_links_may_not_lead_out(run):
    (run / "retrieval" / "out.png").symlink_to("../../secret.png")
    (run / "retrieval" / "near.png").symlink_to("in.png")
    (run / "retrieval" / "loop").symlink_to("loop")
    with pytest.raises(Unreadable, match="outside"):
        inside(run, run / "retrieval", "out.png")
    with pytest.raises(Unreadable):
        inside(run, run / "retrieval", "loop")
    assert inside(run, run / "retrieval", "near.png").name == "in.png"


def test_an_absolute_path_is_refused_even_inside(run):
    with pytest.raises(Unreadable, match="absolute"):
        inside(run, run / "retrieval", str(run / "retrieval" / "in.png"))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{", "is not JSON"),
        ("[1]", "no JSON object"),
        ("[" * 100_000, "is not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
    ],
)
def test_damaged_json(tmp_path, body, reason):
    (tmp_path / "metrics.json").write_text(body)
    with pytest.raises(Unreadable, match=reason):
        read_json(tmp_path / "metrics.json")


def test_json_that_is_too_large(tmp_path):
    with (tmp_path / "metrics.json").open("wb") as file:
        file.truncate(65_000_000)  # sparse
    with pytest.raises(Unreadable, match="65 MB, more than the 64"):
        read_json(tmp_path / "metrics.json")


def test_a_log_in_any_state(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"step": 1, "total": 5.0, "lr": 0.1}\n{"step": 3, "total": 4.0}\nnot json\n[1]\n'
        '{"step": 2, "total": NaN, "kd": "x", "flag": true}\n{"total": 1.0}\n'
        '{"step": 3, "total": 3.5, "kd": 1e400}\n{"step": 4, "tot'
    )
    log = read_log(path)
    assert log.curves == {"total": [(1, 5.0), (3, 3.5)], "lr": [(1, 0.1)]}
    assert log.last_step == 3 and log.last("total") == 3.5 and log.last("kd") is None
    damaged, *lost = log.problems
    assert "line 3, 4, 6 (3 left out)" in damaged
    assert [problem.split()[1] for problem in lost] == ["total", "kd"]


def test_a_log_of_bytes(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(bytes(range(256)) * 4)
    assert read_log(tmp_path / "log.jsonl").curves == {}


def test_parameters_are_counted_from_the_header_alone(make_run, tmp_path):
    assert count_parameters(make_run() / "model" / "model.safetensors") == 10
    (tmp_path / "x").write_bytes(b"\xff" * 64)
    assert count_parameters(tmp_path / "x") is None
    assert count_parameters(tmp_path / "none") is None


def test_what_a_file_is_its_content_says(tmp_path, write_png, write_wav):
    write_png(tmp_path / "a.png")
    write_wav(tmp_path / "a.wav")
    assert sniff((tmp_path / "a.png").read_bytes()[:64]) == "image/png"
    assert sniff((tmp_path / "a.wav").read_bytes()[:64]) == "audio/wav"
    assert sniff(b"<svg onload=alert(1)>") is None
    assert sniff(b"") is None


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("a.png", "sound", "is no sound"),
        ("a.wav", "picture", "is no picture"),
        ("text.png", "picture", "is no picture"),
        ("half.png", "picture", "cut short"),
        ("half.wav", "sound", "cut short"),
        ("empty.png", "picture", "is no picture"),
    ],
)
def test_media_that_are_none(tmp_path, write_png, write_wav, name, kind, reason):
    write_png(tmp_path / "a.png")
    write_wav(tmp_path / "a.wav")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_text("")
    for whole in ("a.png", "a.wav"):
        body = (tmp_path / whole).read_bytes()
        (tmp_path / whole.replace("a.", "half.")).write_bytes(body[: len(body) // 2])
    media = Media(tmp_path, 10**6)
    with pytest.raises(Unreadable, match=reason):
        media.address(tmp_path, tmp_path, name, kind)
    assert media.embedded == 0


def test_beyond_the_limit_files_are_linked(tmp_path, write_png):
    folder = tmp_path / "a run #1" / "out"
    write_png(folder / "large.png", size=256)
    write_png(folder / "small.png", size=8)
    media = Media(tmp_path / "pages", limit=(folder / "small.png").stat().st_size)
    assert media.address(tmp_path, folder, "large.png", "picture") == (
        "../a%20run%20%231/out/large.png"
    )
    assert media.address(tmp_path, folder, "small.png", "picture").startswith("data:image/png;")
    assert (media.embedded, media.linked) == (1, [folder / "large.png"])
    assert media.address(tmp_path, folder, "small.png", "picture").startswith("../a%20run")


def test_a_run_and_its_evaluations(make_run):
    run = read_run(make_run())
    commands = [evaluation.command for evaluation in run.evaluations]
    assert commands == ["probe", "retrieve", "localize", "inpaint", "reconstruct", "weigh_the_soul"]
    assert run.name == "first" and run.parameters == 10 and run.problems == []
    assert run.metrics["steps"] == 300 and run.log.last_step == 300
    assert run.evaluations[1].place == "retrieval"


def test_evaluations_are_not_looked_for_in_checkpoints_or_through_links(make_run, tmp_path):
    run = make_run()
    for place in ("checkpoints/step_1", "model", ".hidden"):
        (run / place).mkdir(parents=True, exist_ok=True)
        (run / place / "metrics.json").write_text('{"command": "probe"}')
    other = make_run("other")
    (run / "linked").symlink_to(other)
    (run / "odd").mkdir()
    (run / "odd" / "metrics.json").symlink_to(other / "probe" / "metrics.json")
    read = read_run(run)
    assert len(read.evaluations) == 6
    assert read.problems == ["odd/metrics.json is refused: it leads out of the run's folder"]


def test_a_run_that_has_not_finished(make_run):
    run = make_run()
    (run / "metrics.json").unlink()
    read = read_run(run)
    assert read.metrics is None and read.setting("config", "preset") == "tiny"


def test_a_finetuned_run_is_an_evaluation_too(make_run):
    run = make_run()
    tuned = run / "finetuned"
    tuned.mkdir()
    (tuned / "metrics.json").write_text('{"command": "finetune", "headline": {"mAP": 0.4}}')
    (tuned / "log.jsonl").write_text('{"step": 1, "total": 2.0}\n')
    (evaluation,) = [e for e in read_run(run).evaluations if e.command == "finetune"]
    assert evaluation.log.last("total") == 2.0
    (itself,) = read_run(tuned).evaluations
    assert itself.command == "finetune" and itself.place == ""


def test_runs_are_told_apart(make_run, tmp_path):
    first = make_run()
    (tmp_path / "x").mkdir()
    os.rename(make_run("second"), tmp_path / "x" / "first")
    names = [run.name for run in read_runs([first, tmp_path / "x" / "first"])]
    assert names == [f"{tmp_path.name}/first", "x/first"]


def test_no_run(make_run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path / "empty", "is no run: it has no log.jsonl"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "none", "does not exist"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            read_runs([path])
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    run = make_run()
    with pytest.raises(ValueError, match="named twice"):
        read_runs([run, f"{run}/."])
    with pytest.raises(ValueError, match="no run is named"):
        read_runs([])
