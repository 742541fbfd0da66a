"""`kdcmae doctor` and `kdcmae datasets` as commands: exit codes, tables, one-line errors."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kdcmae_fast.cli import main
from kdcmae_fast.data.shards import PreparedClip, finish_dataset, write_shard

Image = pytest.importorskip("PIL.Image")
soundfile = pytest.importorskip("soundfile")
MODEL = ("model.audio_length=96", "model.img_size=32", "model.mask_ratio=0.5")
RUN = (*MODEL, "data.num_workers=0", "data.num_frames=2")


@pytest.fixture
def kdcmae(capsys):
    """kdcmae(*arguments) -> (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        return (main([str(argument) for argument in arguments]), *capsys.readouterr())

    return call


@pytest.fixture
def manifest(tmp_path):
    rows = []
    for name in ("one", "two", "three", "four"):
        sound = 0.1 * np.random.default_rng(0).standard_normal(16_000)
        soundfile.write(tmp_path / f"{name}.wav", sound, 16_000)
        for k in range(2):
            (tmp_path / f"frame_{k}").mkdir(exist_ok=True)
            Image.new("RGB", (40, 40)).save(tmp_path / f"frame_{k}" / f"{name}.jpg")
        rows.append({"video_id": name, "wav": str(tmp_path / f"{name}.wav"),
                     "video_path": str(tmp_path), "labels": "a"})  # fmt: skip
    (tmp_path / "list.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "labels.csv").write_text("index,mid,display_name\n0,a,A\n")
    return tmp_path / "list.json"


def test_good_manifest(kdcmae, manifest, tmp_path):
    out = tmp_path / "out"
    labels = ("--label-csv", tmp_path / "labels.csv")
    code, text, errors = kdcmae("doctor", manifest, *labels, "--all", "--output", out, *RUN)
    assert (code, errors) == (0, "")
    lines = text.splitlines()
    assert lines[0].split() == ["check", "result", "count"]
    assert lines[1].split()[:3] == ["opens", "ok", "4"]
    assert "set data.dataset_mean=" in text  # noise is not AudioSet: a warning, no error
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["would_start"] and metrics["checks"]["bad clips"]["result"] == "ok"
    assert (out / "doctor.json").is_file()


def test_exit_code_says_whether_a_run_would_start(kdcmae, manifest, tmp_path):
    (tmp_path / "two.wav").unlink()
    command = ("doctor", manifest, "--output", tmp_path / "out", *RUN)
    code, text, errors = kdcmae(*command)
    assert code == 1 and "bad clips" in text and "two: " in text
    assert errors.count("\n") == 1 and errors.startswith(
        f"error: {manifest}: bad clips: 25.0% of 4"
    )
    assert "raise data.max_bad_share" in errors
    assert kdcmae(*command, "data.max_bad_share=0.25")[0] == 0


def test_recipe_gives_the_settings(kdcmae, manifest, tmp_path):
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        "model: {audio_length: 96, img_size: 32}\ntrain: {epochs: 3, seed: 1}\n"
        "data: {num_frames: 2, num_workers: 0, source: folder, path: elsewhere, dataset_std: 9}\n"
    )
    code, text, _ = kdcmae("doctor", manifest, "--recipe", recipe, "--output", tmp_path / "out")
    assert code == 0 and "configured -5.081, 9 " in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "nowhere: no such file or folder; give a manifest, shards, videos or sounds"),
        ([".", "data.path=x"], "argument data.path=x: data.* (but for source and path)"),
        ([".", "optim.lr=1"], "argument optim.lr=1: data.*"),
        ([".", "--samples", "0"], "--samples 0 must be at least 1"),
        ([".", "data.nonsense=1"], "unknown setting data.nonsense"),
    ],
)
def test_mistakes_are_one_line(kdcmae, tmp_path, arguments, message):
    code, _, errors = kdcmae("doctor", *arguments, "--output", tmp_path / "out")
    assert code == 1 and message in errors and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_shards_from_one_list_against_another(kdcmae, manifest, tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "JPEG")
    sound = 0.1 * np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    clip = PreparedClip("two", "two.mp4", 0.0, 1.0, [picture.getvalue()] * 2, [0.0, 0.5], sound)
    write_shard(tmp_path / "made", 0, [clip], first=0)
    finish_dataset(tmp_path / "made", 1, {})
    against = ("--against", manifest, "--output", tmp_path / "out")
    code, text, _ = kdcmae("doctor", tmp_path / "made", *against, *RUN)
    assert code == 0 and f"1 ids and 0 files are in {manifest} too" in text


def test_datasets(kdcmae, tmp_path):
    code, text, _ = kdcmae("datasets")
    assert code == 0 and "vggsound " in text and "kinetics400 " in text
    code, text, _ = kdcmae("datasets", "esc50")
    assert code == 0 and "meta/esc50.csv" in text and "mean of the 5 folds" in text
    for arguments in (("esc50", "--root", tmp_path), ("--root", tmp_path, "--output", tmp_path)):
        code, _, errors = kdcmae("datasets", *arguments)
        assert code == 1 and "NAME, --root and --output go together" in errors


def test_datasets_makes_lists(kdcmae, tmp_path: Path):
    (tmp_path / "vggsound.csv").write_text("KlsG1EnBEjc,361,dog barking,train\n")
    (tmp_path / "KlsG1EnBEjc_000361.mp4").touch()
    command = ("datasets", "vggsound", "--root", tmp_path, "--output", tmp_path / "out")
    code, text, errors = kdcmae(*command)
    assert (code, errors) == (0, "")
    assert text.splitlines()[1].split() == ["train", "1", "0"]
    assert f"next: kdcmae prepare {tmp_path / 'out' / 'train.csv'}" in text
    (tmp_path / "vggsound.csv").unlink()
    code, _, errors = kdcmae(*command)
    assert code == 1 and f"{tmp_path / 'vggsound.csv'}: no such file; vggsound needs" in errors


CRASH = """
import os
from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data import FrontEnd
from kdcmae_fast.data.doctor.probe import Probe, probe_clips

class Crashes:
    def video_id(self, index):
        return f"clip{index}"

    def read(self, index, epoch):
        os._exit(9)

if __name__ == "__main__":
    probe = Probe(Crashes(), FrontEnd(DataConfig(), ModelConfig()))
    try:
        list(probe_clips(probe, range(3), 1, print))
    except RuntimeError as error:
        print(error)
"""


def test_a_reader_that_crashes_ends_the_command_and_names_the_clips(tmp_path):
    (tmp_path / "crash.py").write_text(CRASH)
    command = [sys.executable, str(tmp_path / "crash.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "a reader died" in done.stdout and "one of 3 clips from clip0 on" in done.stdout
