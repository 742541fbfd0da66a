"""`kdcmae localize`: boxes found by name, figures beside controls, pictures, videos, bad input."""

import json
import wave
from pathlib import Path

import numpy as np
import pytest

from kdcmae_fast.cli import main
from kdcmae_fast.data import SyntheticClips
from kdcmae_fast.data.datasets.boxes import ClipBoxes
from kdcmae_fast.evaluation import EvaluationSource, LocalizationSettings, localize
from kdcmae_fast.evaluation.localization_scores import score_map, truth_map
from kdcmae_fast.evaluation.localization_truth import AnnotatedTruth, clip_name, read_annotations
from kdcmae_fast.evaluation.overlays import draw_boxes, heat_over

XML = "<a><b><bbox><n/><x>{}</x><y>{}</y><x>{}</x><y>{}</y></bbox></b></a>"


def source(folder: Path, **settings) -> EvaluationSource:
    return EvaluationSource(
        checkpoint=str(folder), overrides=("data.num_workers=1",), device="cpu", **settings
    )


@pytest.fixture(scope="module")
def result(model_folder, tmp_path_factory):
    """localize of 6 held-out clips with everything it can write."""
    output = tmp_path_factory.mktemp("localize")
    settings = LocalizationSettings(
        references=3, fusion="ezvsl", priors=("colour",), pictures=2, videos=1, save_maps=True
    )
    return localize(source(model_folder, num_clips=6), settings, output=output), output


def test_figures_and_controls(result):
    metrics, output = result
    assert metrics["command"] == "localize" and metrics["num_clips"] == 6
    assert list(metrics["maps"]) == ["attribution", "cosine", "fused (ezvsl)"]
    assert set(metrics["controls"]) == {
        "another clip's sound", "cosine, turned round", "token length", "colour contrast",
        "prior colour", "centred disc", "centred square", "whole picture", "random",
    }  # fmt: skip
    assert json.loads((output / "metrics.json").read_text()) == metrics
    clips = SyntheticClips(1000, seed=0, img_size=32, clip_seconds=0.64, first=2**40)
    expected = []
    for index in range(6):
        time = 0.75 * 0.64  # the second of two frames
        box = ClipBoxes("x", (clips.truth(index).box(time, 32),), 32.0)
        disc = -np.hypot(*np.meshgrid(np.arange(224) - 111.5, np.arange(224) - 111.5))
        expected.append(score_map(disc, truth_map(box)).ciou)
    assert metrics["controls"]["centred disc"]["mean_ciou"] == pytest.approx(np.mean(expected))
    per_clip = [clip["ciou"]["fused (ezvsl)"] for clip in metrics["clips"]]
    assert metrics["headline"]["cIoU"] == pytest.approx(np.mean(per_clip))
    gains = np.subtract(per_clip, expected)
    above = metrics["above_centred_disc"]
    assert above["mean_ciou"] == pytest.approx(gains.mean())
    assert above["standard_error"] == pytest.approx(gains.std(ddof=1) / 6**0.5)
    best = metrics["best_half_of_picture"]["mean_ciou"]
    rows = [*metrics["maps"].values(), metrics["controls"]["random"]]
    assert all(row["mean_ciou"] <= best + 1e-6 for row in rows)


def test_files(result):
    metrics, output = result
    assert [p["file"] for p in metrics["pictures"]] == [
        "000_synthetic_heldout_000000.png", "001_synthetic_heldout_000001.png"
    ]  # fmt: skip
    assert all((output / p["file"]).stat().st_size > 5000 for p in metrics["pictures"])
    lines = (output / "viz/iou_test_av_obj.txt").read_text().split()
    found = [float(line.split(",")[1]) for line in lines]
    assert found == sorted(c["ciou"]["fused (ezvsl)"] for c in metrics["clips"])
    assert sorted(int(line.split(",")[0]) for line in lines) == list(range(6))
    with np.load(output / "maps.npz") as maps:
        assert len(maps.files) == 6 and maps["synthetic_heldout_000003"].ndim == 2


def test_video_has_every_frame_and_the_sound(result):
    import av

    metrics, output = result
    with av.open(str(output / metrics["videos"][0]["file"])) as container:
        times = [frame.time for frame in container.decode(video=0)]
    clip_times = [(k + 0.5) * 0.64 / 8 for k in range(8)]
    assert times == pytest.approx(clip_times, abs=2e-3)
    with av.open(str(output / metrics["videos"][0]["file"])) as container:
        sound = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
        assert container.streams.audio[0].rate == 16_000
    assert abs(len(sound) - 0.64 * 16_000) <= 3 * 1024 and np.abs(sound).max() > 0.001


def test_saved_maps_are_a_prior_and_batches_do_not_matter(result, model_folder, capsys):
    metrics, output = result
    code = main(
        ["localize", "--checkpoint", str(model_folder), "--num-clips", "6", "--batch-size", "4",
         "--references", "3", "--fuse", "alpha", "--alpha", "1", "--device", "cpu",
         "--prior", str(output / "maps.npz")]
    )  # fmt: skip
    text = capsys.readouterr().out
    assert code == 0 and "centred disc" in text and "controls" in text
    rows = {line.split("  ")[0]: line.split()[-5:] for line in text.splitlines()}
    # alpha = 1 is the prior alone, which is the fused map of the first run
    was = metrics["maps"]["fused (ezvsl)"]
    assert float(rows["fused (alpha)"][0]) == pytest.approx(was["mean_ciou"], abs=6e-4)
    attribution = metrics["maps"]["attribution"]
    assert float(rows["attribution"][0]) == pytest.approx(attribution["mean_ciou"], abs=6e-4)


@pytest.fixture(scope="module")
def flickr(tmp_path_factory) -> Path:
    """Two clips as Flickr-SoundNet has them: frames/, audio/, Annotations/."""
    from PIL import Image

    root = tmp_path_factory.mktemp("flickr")
    for folder in ("frames", "audio", "Annotations"):
        (root / folder).mkdir()
    rng = np.random.default_rng(0)
    for name in ("11", "22", "33"):
        pixels = rng.integers(0, 255, (30, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "frames" / f"{name}.jpg")
        with wave.open(str(root / "audio" / f"{name}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes(rng.integers(-9999, 9999, 32_000, dtype=np.int16).tobytes())
        (root / "Annotations" / f"{name}.xml").write_text(XML.format(0, 0, 128, 256))
    (root / "flickr_test.csv").write_text("11,0\r\n22,5\r\n")
    return root


def flags(root: Path, **changed) -> dict[str, str]:
    return {
        "annotations": str(root / "Annotations"),
        "frames": str(root / "frames"),
        "sounds": str(root / "audio"),
        **changed,
    }


def test_flickr_soundnet(flickr, model_folder):
    settings = LocalizationSettings(
        references=2, map="cosine", ids=str(flickr / "flickr_test.csv"), **flags(flickr)
    )
    metrics = localize(source(model_folder), settings)
    assert [clip["clip"] for clip in metrics["clips"]] == ["11", "22"]
    assert metrics["truth"] == "consensus" and metrics["map"] == "cosine"
    assert metrics["clips"][0]["truth_share"] == 0.5  # one box over the left half of the picture
    whole = metrics["controls"]["whole picture"]["mean_ciou"]
    assert whole == pytest.approx(0.25 / 0.75)  # sum(G) = 1/4; the other half of the picture counts


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda r: (r / "frames/33.jpg").write_text("no picture"), "frames/33.jpg"),
        (lambda r: (r / "frames/33.jpg").unlink(), "1 of 3 clips .* the first is 33"),
        (lambda r: (r / "Annotations/22.xml").write_text("<a><b/></a>"), "22.xml: no bbox"),
        (lambda r: (r / "Annotations/22.xml").write_text("<a>"), "22.xml: not XML"),
    ],
)
def test_bad_files_are_named(flickr, model_folder, tmp_path, capsys, break_it, message):
    import re
    import shutil

    root = shutil.copytree(flickr, tmp_path / "bad")
    break_it(root)
    words = [w for name, value in flags(root).items() for w in (f"--{name}", value)]
    arguments = ["localize", "--checkpoint", str(model_folder), "--device", "cpu", *words]
    assert main(arguments) == 1
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1 and re.search(message, text)


def test_annotations_without_a_clip(model_folder, tmp_path):
    from kdcmae_fast.data import open_dataset
    from kdcmae_fast.evaluation.source import open_source

    opened = open_source(source(model_folder, split="heldout"))
    dataset = open_dataset(opened.data, opened.model.config, seed=0, split="heldout")
    there = ClipBoxes("synthetic_heldout_000002", ((0, 0, 1, 1),), 1.0)
    gone = ClipBoxes("nobody", ((0, 0, 1, 1),), 1.0)
    with pytest.raises(ValueError, match="x.json: 1 of 2 clips are not .* the first is nobody"):
        AnnotatedTruth(dataset, [there, gone], "union", where="x.json")
    truth = AnnotatedTruth(dataset, [there, gone], "union", where="x.json", allow_missing=True)
    assert truth.indices == [2] and truth.missing == ["nobody"] and truth.boxes(2, 0.1) == there
    with pytest.raises(ValueError, match="none of its 1 clips"):
        AnnotatedTruth(dataset, [gone], "union", where="x", allow_missing=True)
    assert clip_name("a/b/00W1lcxW-WU_40.000.mp4") == "00W1lcxW-WU_40.000"
    assert clip_name("00W1lcxW-WU_000040") == "00W1lcxW-WU_000040"


def test_vgg_ss_file(tmp_path):
    rows = [{"file": f"00W1lcxW-W{k}_000040", "class": "a", "bbox": [[0, 0, 1, 1]]} for k in "ab"]
    path = tmp_path / "vggss.json"
    path.write_text(json.dumps(rows))
    (tmp_path / "ids.csv").write_text("00W1lcxW-Wb_000040\n")
    boxes, rule = read_annotations(str(path), str(tmp_path / "ids.csv"))
    assert [b.id for b in boxes] == ["00W1lcxW-Wb_000040"] and rule == "union"
    (tmp_path / "ids.csv").write_text("00W1lcxW-Wz_000040\n")
    with pytest.raises(ValueError, match="no boxes of 00W1lcxW-Wz_000040"):
        read_annotations(str(path), str(tmp_path / "ids.csv"))
    with pytest.raises(FileNotFoundError, match="is not there"):
        read_annotations(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"map": "heat"}, "map='heat'"),
        ({"references": 1}, "references=1"),
        ({"frames": "x"}, "go with --annotations"),
        ({"annotations": "a", "frames": "x"}, "go together"),
        ({"priors": ("colour",)}, "needs a rule"),
        ({"fusion": "avl-flickr", "priors": ("colour",)}, "takes 2 prior maps, got 1"),
        ({"fusion": "ezvsl", "priors": ("none.npz",)}, "none.npz is not there"),
    ],
)
def test_settings_that_cannot_be(model_folder, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        localize(source(model_folder, num_clips=2), LocalizationSettings(**settings))


def test_sync_hears_the_segment_of_the_frame(make_model, tmp_path):
    make_model("cav_mae_sync").save_pretrained(tmp_path / "model")
    metrics = localize(source(tmp_path, num_clips=3), LocalizationSettings(references=2))
    assert metrics["num_clips"] == 3


def test_drawing():
    frame = np.zeros((20, 20, 3), dtype=np.uint8)
    drawn = draw_boxes(frame, [(2, 3, 12, 13), (5, 5, 5, 9)], width=1)
    assert (drawn.any(-1)).sum() == 4 * 9 and drawn[3, 2].any() and not frame.any()
    heat = np.zeros((20, 20), dtype=np.float32)
    heat[0, 0], heat[1, 1] = np.nan, 1
    over = heat_over(frame, heat, strength=1)
    assert not over[0, 0].any() and over[1, 1, 0] > over[1, 1, 2] and over[5, 5, 2] > over[5, 5, 0]
