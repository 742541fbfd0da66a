"""Flickr-SoundNet and VGG-SS: boxes as their files have them, corrupt ones too."""

import json
from pathlib import Path

import pytest

from kdcmae_fast.data.datasets import read_dataset_lists, read_flickr_boxes, write_lists

ONE, TWO = "-0RWZT-miFs", "00W1lcxW-WU"
XML = """<annotation>
 <filename>10000130166.jpg</filename>
 <annotator1><bbox><name>x</name><xmin>10</xmin><ymin>0</ymin><xmax>128</xmax><ymax>255</ymax></bbox>
  <comment/></annotator1>
 <annotator2><bbox><n/><a>1</a><b>2</b><c>3</c><d>4</d></bbox>
  <bbox><n/><a>-4</a><b>2</b><c>300</c><d>256</d></bbox></annotator2>
</annotation>"""


def put(root: Path, files: dict[str, str]) -> Path:
    """Write text files; a content of "" makes an empty one, as stand-in for media."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def touch(root: Path, *names: str) -> Path:
    return put(root, dict.fromkeys(names, ""))


def found(name: str, root: Path) -> list[tuple[str, str, tuple[str, ...]]]:
    listing = read_dataset_lists(name, root)
    return [(e.split, e.id, e.labels) for e in listing.entries if e.found]


def test_flickr_soundnet(tmp_path):
    put(tmp_path, {"flickr_test.csv": "10000130166,0\r\n42,17\r\n", "Annotations/42.xml": XML,
                   "Annotations/10000130166.xml": XML})  # fmt: skip
    touch(tmp_path, "audio/42.wav", "frames/42.jpg")
    boxes = read_flickr_boxes(tmp_path / "Annotations/10000130166.xml")
    assert boxes.boxes == ((10, 0, 128, 255), (1, 2, 3, 4), (-4, 2, 300, 256))
    assert boxes.annotators == (0, 1, 1) and boxes.frame == 256
    # floor(224 v / 256), inside of the picture
    assert boxes.pixels(224) == [(8, 0, 112, 223), (0, 1, 2, 3), (0, 1, 224, 224)]
    assert found("flickr_soundnet", tmp_path) == [("test", "42", ())]
    metrics = write_lists("flickr_soundnet", tmp_path, tmp_path / "out")
    assert metrics["lists"] == {"test": {"clips": 1, "missing": 1}}
    assert "1 of 2 clips have no picture in frames/" in metrics["notes"]
    rows = json.loads((tmp_path / "out/boxes.json").read_text())
    assert rows[1]["picture"].endswith("frames/42.jpg") and rows[1]["boxes"][0] == [10, 0, 128, 255]


@pytest.mark.parametrize(
    "text, message",
    [
        ("<a><b><bbox><n/><x>1</x></bbox></b></a>", "five values"),
        ("<a><b><bbox><n/><x>1</x><x>1</x><x>1.5</x><x>1</x></bbox></b></a>", "whole numbers"),
        ("<a><b/></a>", "no bbox"),
        ("<a>", "not XML"),
        ('<!DOCTYPE a [<!ENTITY b "bb">]><a>&b;</a>', "declarations"),
    ],
)
def test_malformed_boxes(tmp_path, text, message):
    put(tmp_path, {"1.xml": text})
    with pytest.raises(ValueError, match=message):
        read_flickr_boxes(tmp_path / "1.xml")


def test_vgg_ss(tmp_path):
    rows = [
        {"file": f"{ONE}_000030", "class": "playing harp", "bbox": [[0.25, -0.5, 0.75, 1.5]]},
        {"file": f"{TWO}_000012", "class": "people, shouting",
         "bbox": [[0.1, 0.1, -2.88e16, 0.9], [0.0, 0.0, 0.003125, 0.5]]},
    ]  # fmt: skip
    put(tmp_path, {"vggss.json": json.dumps(rows), "vggss_heard_test.csv": f"{TWO}_000012"})
    touch(tmp_path, f"audio/{ONE}_000030.flac", f"audio/{TWO}_000012.wav")
    assert found("VGG-SS", tmp_path) == [
        ("test", f"{ONE}_000030", ("playing harp",)),
        ("test", f"{TWO}_000012", ("people_ shouting",)),
        ("heard", f"{TWO}_000012", ("people_ shouting",)),
    ]
    listing = read_dataset_lists("vgg_ss", tmp_path)
    assert listing.boxes[0].pixels(224) == [(56, 0, 168, 224)]
    assert listing.boxes[1].pixels(224) == [(22, 22, 0, 201), (0, 0, 0, 112)]
    assert "1 clips have no box with an area: they always score 0" in listing.notes
    for spoil, message in (
        ({"file": "../../x"}, "is not <YouTube id>"),
        ({"bbox": [[1, 2, 3]]}, "four numbers"),
        ({"bbox": []}, "no box"),
        ({"bbox": [[1, 2, 3, "x"]]}, "four numbers"),
    ):
        put(tmp_path, {"vggss.json": json.dumps([rows[0], {**rows[1], **spoil}])})
        with pytest.raises(ValueError, match=rf"vggss.json, entry 1: .*{message}"):
            found("vgg_ss", tmp_path)
    put(tmp_path, {"vggss.json": json.dumps(rows), "vggss_heard_test.csv": "nothing"})
    with pytest.raises(ValueError, match=r"heard_test.csv, line 1: expected an id of vggss.json"):
        found("vgg_ss", tmp_path)
