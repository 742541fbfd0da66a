"""kdcmae doctor on sounds without pictures: lists, folders, and what it says of the model."""

import json

import numpy as np
import pytest
import soundfile

from kdcmae_fast.cli import main
from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data import open_dataset
from kdcmae_fast.data.doctor import Diagnosis, examine
from kdcmae_fast.data.doctor.lists import guess_source

MODEL = ModelConfig(modalities="audio", audio_length=48)  # clips of 0.495 s
CSV = "index,mid,display_name\n0,a,First\n1,b,Second\n"
SETTINGS = ("model.modalities=audio", "model.audio_length=48", "data.num_workers=0")


@pytest.fixture
def words(tmp_path):
    """Four words of half a second in two folders; rows of a list of them."""
    rows = []
    for number, name in enumerate(("x/one", "x/two", "y/one", "y/two")):
        path = tmp_path / "words" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sound = 0.1 * np.random.default_rng(number).standard_normal(4000)
        soundfile.write(path, sound, 8000)
        rows.append({"video_id": name, "wav": str(path), "labels": "ab"[number % 2]})
    (tmp_path / "labels.csv").write_text(CSV)
    return rows


@pytest.fixture
def look(words, tmp_path):
    """look(rows, ...) -> what the doctor finds in a list of them."""

    def call(rows=words, model=MODEL, **settings) -> Diagnosis:
        path = tmp_path / "list.json"
        path.write_text(json.dumps({"data": rows}))
        values = {"num_workers": 0, "label_csv": str(tmp_path / "labels.csv"), **settings}
        return examine(str(path), DataConfig(**values), model, samples=None)

    return call


def found(diagnosis: Diagnosis) -> dict[str, tuple[str, int]]:
    return {c.name: (c.result, c.count) for c in diagnosis.checks if c.result != "ok"}


def check(diagnosis: Diagnosis, name: str):
    return next(c for c in diagnosis.checks if c.name == name)


def test_a_good_list(look):
    diagnosis = look()
    assert diagnosis.would_start and diagnosis.data.source == "sounds"
    assert check(diagnosis, "opens").detail == "clips, data.source=sounds"
    assert [c.name for c in diagnosis.checks] == [
        "opens", "list", "duplicate ids", "duplicate files", "labels", "classes", "bad clips",
        "pictures", "sample rates", "channels", "durations", "levels", "normalisation",
    ]  # fmt: skip
    assert diagnosis.histogram == {"a": 2, "b": 2} and len(diagnosis.facts) == 4
    assert {f.properties[:3] for f in diagnosis.facts} == {(0.5, 8000, 1)}
    assert [fact.label for fact in diagnosis.facts] == [0, 1, 0, 1]
    assert found(diagnosis).keys() == {"sample rates", "normalisation"}  # 8 kHz, and noise
    assert "prepare" not in check(diagnosis, "sample rates").advice  # it takes videos


def test_bad_sounds_and_rows(look, words, tmp_path):
    (tmp_path / "words/x/two.wav").unlink()
    soundfile.write(tmp_path / "words/y/one.wav", np.full(400, 0.1), 8000)  # 0.05 s
    rows = [*words, {**words[0], "labels": "a,zzz"}]
    problems = found(diagnosis := look(rows))
    assert problems["bad clips"] == ("error", 2) and not diagnosis.would_start
    assert problems["missing file"][1] == problems["too short"][1] == 1
    assert problems["duplicate ids"][1] == problems["duplicate files"][1] == 1
    assert problems["labels"] == ("warning", 1)
    diagnosis = look([*words, {"video_id": "x"}, {**words[0], "labels": "zzz"}])
    assert check(diagnosis, "list").examples == ["entry 4: wav, labels must be text"]
    assert found(diagnosis)["labels"] == ("error", 1)
    assert found(diagnosis)["opens"][0] == "error" and not diagnosis.facts


def test_a_folder_lists_what_a_run_reads(words, tmp_path):
    (tmp_path / "words/notes.txt").write_text("no sound")
    (tmp_path / "words/old.tar").write_bytes(b"")
    data = DataConfig(num_workers=0)
    diagnosis = examine(str(tmp_path / "words"), data, MODEL, samples=None)
    run = open_dataset(diagnosis.data, MODEL, seed=0)
    names = ["x/one.wav", "x/two.wav", "y/one.wav", "y/two.wav"]
    assert [fact.video_id for fact in diagnosis.facts] == names
    assert [run.video_id(index) for index in range(len(run))] == names
    assert check(diagnosis, "list").count == 4 and diagnosis.would_start


@pytest.mark.parametrize("modalities", ["both", "video"])
def test_a_model_that_needs_pictures(look, modalities):
    diagnosis = look(model=ModelConfig(modalities=modalities, audio_length=48))
    pictures = check(diagnosis, "pictures")
    assert (pictures.result, pictures.count) == ("error", 4) and not diagnosis.would_start
    assert pictures.advice.startswith("set model.modalities=audio")


def test_what_a_path_holds(words, tmp_path):
    def source(rows, **options):
        (tmp_path / "a.json").write_text(json.dumps({"data": rows}))
        return guess_source(str(tmp_path / "a.json"), **options)

    pictured = [{**row, "video_path": "frames"} for row in words]
    assert source(words) == source([{**row, "video_path": ""} for row in words]) == "sounds"
    assert source(pictured) == source([*words, pictured[0]]) == source([]) == "manifest"
    assert source(pictured, sounds=True) == "sounds"
    folder = tmp_path / "words"
    assert guess_source(str(folder)) == "sounds"
    (folder / "x/film.mp4").touch()
    assert guess_source(str(folder)) == "folder"
    assert guess_source(str(folder), sounds=True) == "sounds"
    (tmp_path / "train.json").write_text(json.dumps({"data": pictured}))
    (tmp_path / "frame_0").mkdir()  # as `kdcmae prepare --layout cav_mae` leaves a folder
    with pytest.raises(ValueError, match=r"CAV-MAE's layout; give its list, .*/train\.json$"):
        guess_source(str(tmp_path))
    assert guess_source(str(tmp_path), sounds=True) == "sounds"


def test_the_command(words, tmp_path, capsys):
    pictured = [{**row, "video_path": str(tmp_path)} for row in words]
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"data": pictured}))
    recipe = tmp_path / "run.yaml"
    recipe.write_text("model: {modalities: audio, audio_length: 48}\ndata: {source: sounds}\n")
    command = ["doctor", str(path), "--output", str(tmp_path / "out")]
    assert main([*command, *SETTINGS]) == 1  # as a manifest: there are no frames
    assert "frame_" in capsys.readouterr().out
    for settings in ((*SETTINGS, "data.source=sounds"), ("--recipe", str(recipe))):
        assert main([*command, *settings]) == 0
        assert "clips, data.source=sounds" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/metrics.json").read_text())["source"] == "sounds"
    assert main([*command, "data.source=shards"]) == 1
    assert "data.* (but for source and path)" in capsys.readouterr().err
