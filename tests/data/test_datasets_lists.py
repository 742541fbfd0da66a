"""What `kdcmae datasets` writes and prints."""

import csv
import json
from pathlib import Path

import pytest

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data import open_dataset
from kdcmae_fast.data.datasets import (
    KNOWN,
    dataset_text,
    datasets_table,
    find_dataset,
    read_dataset_lists,
    write_lists,
)
from kdcmae_fast.data.datasets.write import lists_text
from kdcmae_fast.data.manifest import read_label_csv, read_manifest

ONE, TWO, THREE = "-0RWZT-miFs", "00W1lcxW-WU", "KlsG1EnBEjc"
AUDIOSET = """\
# Segments csv created Sun Mar  5 10:54:25 2017
# num_ytids=3, num_segs=3, num_unique_labels=3, num_positive_labels=4
# YTID, start_seconds, end_seconds, positive_labels
-0RWZT-miFs, 420.000, 430.000, "/m/03v3yw,/m/0k4j"
00W1lcxW-WU, 40.000, 50.000, "/m/09x0r"
KlsG1EnBEjc, 0.000, 7.500, "/m/0k4j"
"""
INDICES = """\
index,mid,display_name
0,/m/09x0r,"Speech"
1,/m/03v3yw,"Keys jangling"
2,/m/0k4j,"Car, passing"
"""


def put(root: Path, files: dict[str, str]) -> Path:
    """Write text files; a content of "" makes an empty one, as stand-in for media."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def touch(root: Path, *names: str) -> Path:
    return put(root, dict.fromkeys(names, ""))


@pytest.fixture
def audioset(tmp_path):
    put(tmp_path, {"eval_segments.csv": AUDIOSET, "class_labels_indices.csv": INDICES})
    return touch(tmp_path, f"videos/a/{ONE}_000420.mp4", f"videos/{THREE}.mkv", "videos/notes.txt")


def test_lists_that_prepare_takes(audioset):
    out = audioset / "out"
    metrics = write_lists("audioset_eval", audioset, out)
    assert metrics["lists"] == {"eval": {"clips": 2, "missing": 1}}
    with (out / "eval.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "start", "end", "labels", "id"]
    assert rows[0]["labels"] == "/m/03v3yw,/m/0k4j" and rows[0]["start"] == ""
    assert (rows[1]["start"], rows[1]["end"]) == ("0", "7.5")
    assert Path(rows[1]["path"]).is_absolute() and Path(rows[1]["path"]).is_file()
    assert read_label_csv(str(out / "labels.csv")) == {"/m/09x0r": 0, "/m/03v3yw": 1, "/m/0k4j": 2}
    assert f"eval,{TWO}_000040," in (out / "missing.csv").read_text()
    assert metrics["classes_with_clips"] == 2
    assert "3 classes found, the published dataset has 527" in metrics["notes"]
    assert json.loads((out / "metrics.json").read_text()) == metrics
    text = lists_text(metrics, out)
    assert "missing (all are in" in text and f"{TWO}_000040" in text
    assert f"kdcmae prepare {out / 'eval.csv'} --label-csv {out / 'labels.csv'}" in text


def test_lists_of_folds(tmp_path):
    put(tmp_path, {"ucfTrainTestlist/classInd.txt": "1 Archery\n"})
    for fold in (1, 2, 3):
        put(tmp_path, {f"ucfTrainTestlist/trainlist0{fold}.txt": "Archery/v_a.avi 1\n",
                       f"ucfTrainTestlist/testlist0{fold}.txt": "Archery/v_b.avi\n"})  # fmt: skip
    touch(tmp_path, "UCF-101/Archery/v_a.avi")
    metrics = write_lists("ucf101", tmp_path, tmp_path / "out")
    assert metrics["lists"]["fold1_train"] == {"clips": 1, "missing": 0}
    assert metrics["lists"]["fold3_test"] == {"clips": 0, "missing": 1}
    assert "fold2_train.csv" in metrics["files"] and len(metrics["lists"]) == 6
    assert "Archery/v_a\n" in (tmp_path / "out/fold2_train.csv").read_text().replace("\r", "")
    text = lists_text(metrics, tmp_path / "out")
    assert f"kdcmae prepare {tmp_path / 'out/fold1_train.csv'}" in text


def test_a_tree_in_the_cav_mae_layout_becomes_a_manifest(audioset):
    touch(audioset, f"frame_0/{TWO}_40.000.jpg", f"audio/{TWO}_40.000.wav")
    touch(audioset, f"audio/{ONE}_000420.flac")  # without a picture
    metrics = write_lists("audioset_eval", audioset, audioset / "out")
    assert metrics["lists"] == {"eval": {"clips": 1, "missing": 2}}
    path = str(audioset / "out/eval.json")
    rows = read_manifest(path, read_label_csv(str(audioset / "out/labels.csv")))
    assert [(row.video_id, row.label) for row in rows] == [(f"{TWO}_40.000", 0)]
    assert rows[0].video_path == str(audioset)
    data = DataConfig(source="manifest", path=path)
    assert len(open_dataset(data, ModelConfig(), seed=0)) == 1


def test_sound_without_pictures_says_so(tmp_path):
    folder = "FSD50K.ground_truth"
    put(tmp_path, {f"{folder}/vocabulary.csv": "0,Bark,/m/05tny_\n1,Car,/m/0k4j\n",
                   f"{folder}/dev.csv": "fname,labels,mids,split\n"
                                        '1,"Bark,Car","/m/05tny_,/m/0k4j",train\n',
                   f"{folder}/eval.csv": "fname,labels,mids\n2,Bark,/m/05tny_\n"})  # fmt: skip
    touch(tmp_path, "FSD50K.dev_audio/1.wav")
    metrics = write_lists("fsd50k", tmp_path, tmp_path / "out")
    assert metrics["files"] == ["eval.json", "train.json", "labels.csv", "missing.csv"]
    rows = json.loads((tmp_path / "out/train.json").read_text())["data"]
    assert rows[0]["labels"] == "/m/05tny_,/m/0k4j" and rows[0]["video_path"] == ""
    assert json.loads((tmp_path / "out/eval.json").read_text()) == {"data": []}
    assert any("data.source=sounds" in note for note in metrics["notes"])


@pytest.mark.parametrize("name", KNOWN)
def test_a_missing_file_is_named_with_the_layout(tmp_path, name):
    with pytest.raises(ValueError) as error:
        write_lists(name, tmp_path, tmp_path / "out")
    text = str(error.value)
    assert "no such file" in text and KNOWN[name].layout[-1] in text and "\n" not in text
    with pytest.raises(ValueError, match="is not a folder"):
        read_dataset_lists(name, tmp_path / "nowhere")


def test_a_malformed_line_leaves_no_half_written_list(audioset):
    put(audioset, {"eval_segments.csv": AUDIOSET + "x, y\n"})
    with pytest.raises(ValueError, match="line 7"):
        write_lists("audioset_eval", audioset, audioset / "out")
    assert not list((audioset / "out").iterdir())


def test_what_is_printed():
    table = datasets_table()
    assert all(f"\n{name} " in table for name in KNOWN)
    for name, known in KNOWN.items():
        text = dataset_text(name)
        assert known.title in text and known.metric in text and known.normalisation in text
    assert find_dataset("HMDB-51")[0] == "hmdb51"
    with pytest.raises(ValueError, match="no dataset 'imagenet'; known are audioset_20k"):
        find_dataset("imagenet")


def test_statistics_are_those_of_the_settings():
    """The only published ones for our front-end are the defaults."""
    default = DataConfig()
    text = f"data.dataset_mean={default.dataset_mean} data.dataset_std={default.dataset_std}"
    stated = [name for name, known in KNOWN.items() if "data.dataset_mean=" in known.normalisation]
    assert stated == ["audioset_20k", "audioset_2m", "audioset_eval", "vggsound"]
    for name, known in KNOWN.items():
        published = name in stated
        assert (text if published else "measure with `kdcmae doctor`") in known.normalisation
