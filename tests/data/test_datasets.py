"""Published datasets: tiny trees in each official layout, and malformed lines."""

from pathlib import Path

import pytest

from kdcmae_fast.data.datasets import read_dataset_lists

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


def entries(name: str, root: Path) -> list[tuple]:
    """Split, fold, id, path below root, labels, start, end of the clips that are there."""
    listing = read_dataset_lists(name, root)
    return [
        (e.split, e.fold, e.id, below(e.media, root), e.labels, e.start, e.end)
        for e in listing.entries
        if e.found
    ]


def below(path: str, root: Path) -> str:
    return Path(path).relative_to(root).as_posix()


def missing(name: str, root: Path) -> list[str]:
    return [entry.id for entry in read_dataset_lists(name, root).entries if not entry.found]


def classes(name: str, root: Path) -> list[tuple]:
    return [tuple(row) for row in read_dataset_lists(name, root).classes]


@pytest.fixture
def audioset(tmp_path):
    put(tmp_path, {"eval_segments.csv": AUDIOSET, "class_labels_indices.csv": INDICES})
    return touch(tmp_path, f"videos/a/{ONE}_000420.mp4", f"videos/{THREE}.mkv", "videos/notes.txt")


def test_audioset(audioset):
    assert entries("audioset_eval", audioset) == [
        ("eval", 0, f"{ONE}_000420", f"videos/a/{ONE}_000420.mp4", ("/m/03v3yw", "/m/0k4j"),
         None, None),
        ("eval", 0, f"{THREE}_000000", f"videos/{THREE}.mkv", ("/m/0k4j",), 0.0, 7.5),
    ]  # fmt: skip
    assert missing("audioset_eval", audioset) == [f"{TWO}_000040"]
    assert classes("audioset_eval", audioset)[2] == (2, "/m/0k4j", "Car, passing")


@pytest.mark.parametrize(
    "name", ["_000040", "_40.000", "_40000_50000", "_40_50", "_40"], ids=lambda name: name
)
def test_names_of_cut_segments(audioset, name):
    touch(audioset, f"videos/{TWO}{name}.mp4", f"videos/{TWO}.mp4")
    cut = next(row for row in entries("audioset_eval", audioset) if row[2] == f"{TWO}_000040")
    assert cut[3] == f"videos/{TWO}{name}.mp4" and cut[5:] == (None, None)


def test_audioset_2m_is_both_lists(audioset):
    balanced, rest = AUDIOSET.splitlines()[:5], AUDIOSET.splitlines()
    put(audioset, {"balanced_train_segments.csv": "\n".join(balanced)})
    put(audioset, {"unbalanced_train_segments.csv": "\n".join([*rest[:3], *rest[5:]])})
    clips = entries("audioset_2m", audioset)
    assert [row[2] for row in clips] == [f"{ONE}_000420", f"{THREE}_000000"]
    assert {row[0] for row in clips} == {"train"}
    assert [row[2] for row in entries("audioset_20k", audioset)] == [f"{ONE}_000420"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("abc, 0.000, 10.000, \"/m/09x0r\"", "a YouTube id, and an end after the start"),
        (f"{ONE}, 5.000, 4.000, \"/m/09x0r\"", "an end after the start"),
        (f"{ONE}, x, 4.000, \"/m/09x0r\"", "a time in seconds, found 'x'"),
        (f"{ONE}, 1.000, nan, \"/m/09x0r\"", "a time in seconds"),
        (f"{ONE}, 1.000, 4.000, \"/m/zzz\"", "labels of class_labels_indices.csv, found '/m/zzz'"),
        (f"{ONE}, 1.000, 4.000", "YTID, start, end, \"labels\""),
        ("../../etc/p, 1.000, 4.000, \"/m/09x0r\"", "a YouTube id"),
    ],
)  # fmt: skip
def test_malformed_audioset_lines(audioset, line, message):
    put(audioset, {"eval_segments.csv": AUDIOSET + line + "\n"})
    with pytest.raises(ValueError) as error:
        entries("audioset_eval", audioset)
    assert "eval_segments.csv, line 7: expected" in str(error.value)
    assert message in str(error.value)


VGGSOUND = f"""\
{ONE},30,people marching,test
{TWO},0,"bird chirping, tweeting",train
{THREE},361,people marching,train
"""


def test_vggsound(tmp_path):
    put(tmp_path, {"vggsound.csv": VGGSOUND})
    touch(tmp_path, f"{ONE}_000030.mp4", f"video/{TWO}.mp4", f"video/{THREE}_361000_371000.mp4")
    touch(tmp_path, f"video/deeper/{ONE}_000030.webm")
    listing = read_dataset_lists("VGG-Sound", tmp_path)
    assert [tuple(row) for row in listing.classes] == [
        (0, "vgg_0", "bird chirping_ tweeting"),
        (1, "vgg_1", "people marching"),
    ]
    assert "alphabetical" in listing.notes[0]
    assert entries("vggsound", tmp_path) == [
        ("test", 0, f"{ONE}_000030", f"video/deeper/{ONE}_000030.webm", ("vgg_1",), None, None),
        ("train", 0, f"{TWO}_000000", f"video/{TWO}.mp4", ("vgg_0",), 0.0, 10.0),
        ("train", 0, f"{THREE}_000361", f"video/{THREE}_361000_371000.mp4", ("vgg_1",), None, None),
    ]


def test_vggsound_with_the_published_class_numbers(tmp_path):
    numbers = "index,mid,display_name\n0,vgg_0,people marching\n1,vgg_1,bird chirping_ tweeting\n"
    put(tmp_path, {"vggsound.csv": VGGSOUND, "class_labels_indices_vgg.csv": numbers})
    touch(tmp_path, f"videos/{TWO}_000000.mp4")
    assert entries("vggsound", tmp_path)[0][4] == ("vgg_1",)
    put(tmp_path, {"class_labels_indices_vgg.csv": numbers.replace("people ", "")})
    with pytest.raises(ValueError, match="no class 'people marching', which vggsound.csv has"):
        entries("vggsound", tmp_path)


@pytest.mark.parametrize("line", [f"{ONE},30,x", f"{ONE},30,x,val", "short,30,x,test"])
def test_malformed_vggsound_lines(tmp_path, line):
    put(tmp_path, {"vggsound.csv": VGGSOUND + line})
    with pytest.raises(ValueError, match=r"vggsound.csv, line 4: expected"):
        entries("vggsound", tmp_path)


HEADER = "label,youtube_id,time_start,time_end,split,is_cc\n"


@pytest.fixture
def kinetics(tmp_path):
    put(tmp_path, {"train.csv": f'{HEADER}"playing guitar",{ONE},9,19,train,0\n'
                                f"bowling,{TWO},40,50,train,0\n"})  # fmt: skip
    put(tmp_path, {"validate.csv": f"{HEADER}bowling,{THREE},7,17,validate,1\n"})
    touch(tmp_path, f"train/playing guitar/{ONE}_000009_000019.mp4")
    return touch(tmp_path, f"val/bowling/{THREE}_000007_000017.avi")


def test_kinetics400(kinetics):
    assert entries("Kinetics-400", kinetics) == [
        ("train", 0, f"{ONE}_000009_000019", f"train/playing guitar/{ONE}_000009_000019.mp4",
         ("playing_guitar",), None, None),
        ("val", 0, f"{THREE}_000007_000017", f"val/bowling/{THREE}_000007_000017.avi",
         ("bowling",), None, None),
    ]  # fmt: skip
    assert classes("kinetics400", kinetics) == [
        (0, "bowling", "bowling"),
        (1, "playing_guitar", "playing guitar"),
    ]
    assert missing("kinetics400", kinetics) == [f"{TWO}_000040_000050"]
    touch(kinetics, f"train/bowling/{TWO}_000040_000050.mp4")
    assert missing("kinetics400", kinetics) == []


def test_kinetics_sound_is_32_of_the_classes(kinetics):
    from kdcmae_fast.data.datasets.youtube import KINETICS_SOUND

    assert len(KINETICS_SOUND) == 32 and list(KINETICS_SOUND) == sorted(KINETICS_SOUND)
    with pytest.raises(ValueError, match="no clip of class 'blowing_nose'"):
        entries("kinetics_sound", kinetics)
    rows = [f"{name},{ONE},{i},{i + 10},train,0" for i, name in enumerate(KINETICS_SOUND)]
    rows.append(f"abseiling,{ONE},99,109,train,0")
    put(kinetics, {"train.csv": HEADER + "\n".join(rows) + "\n"})
    listing = read_dataset_lists("kinetics_sound", kinetics)
    labels = [entry.labels[0] for entry in listing.entries]
    assert labels == [*KINETICS_SOUND, "bowling"]  # the last one is of validate.csv
    assert [row.mid for row in listing.classes] == list(KINETICS_SOUND)


@pytest.mark.parametrize(
    "line", ["bowling,a,1", f"bowling,{ONE},1,2,x,0", "bowling,../../../../,1,2,train,0"]
)
def test_malformed_kinetics_lines(kinetics, line):
    put(kinetics, {"train.csv": f"{HEADER}{line}\n"})
    with pytest.raises(ValueError, match=r"train.csv, line 2: expected"):
        entries("kinetics400", kinetics)
    put(kinetics, {"train.csv": "label,youtube_id\n"})
    with pytest.raises(ValueError, match=r"train.csv, line 1: no column time_start"):
        entries("kinetics400", kinetics)


@pytest.fixture
def ucf101(tmp_path):
    lists = {"classInd.txt": "1 ApplyEyeMakeup\r\n2 Archery\r\n"}
    for fold in (1, 2, 3):
        train = "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\nArchery/v_Archery_g08_c01.avi 2\n"
        lists[f"trainlist0{fold}.txt"] = train
        lists[f"testlist0{fold}.txt"] = f"Archery/v_Archery_g0{fold}_c01.avi\n"
    put(tmp_path, {f"ucfTrainTestlist/{name}": text for name, text in lists.items()})
    touch(tmp_path, "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi")
    return touch(tmp_path, "UCF-101/Archery/v_Archery_g08_c01.avi",
                 "UCF-101/Archery/v_Archery_g01_c01.avi")  # fmt: skip


def test_ucf101(ucf101):
    clips = entries("ucf101", ucf101)
    assert clips[:3] == [
        ("train", 1, "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01",
         "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", ("ApplyEyeMakeup",), None, None),
        ("train", 1, "Archery/v_Archery_g08_c01", "UCF-101/Archery/v_Archery_g08_c01.avi",
         ("Archery",), None, None),
        ("test", 1, "Archery/v_Archery_g01_c01", "UCF-101/Archery/v_Archery_g01_c01.avi",
         ("Archery",), None, None),
    ]  # fmt: skip
    assert missing("ucf101", ucf101) == [
        "Archery/v_Archery_g02_c01", "Archery/v_Archery_g03_c01"
    ]  # fmt: skip
    assert classes("ucf101", ucf101) == [(0, "ApplyEyeMakeup", "ApplyEyeMakeup"),
                                         (1, "Archery", "Archery")]  # fmt: skip


@pytest.mark.parametrize(
    "file, line, message",
    [
        ("trainlist02.txt", "Archery/v.avi", "`Class/video.avi number`"),
        ("trainlist02.txt", "Archery/v.avi 1", "the number of Archery, 2"),
        ("testlist03.txt", "Archery/v.avi 2", "`Class/video.avi`"),
        ("testlist03.txt", "Nothing/v.avi", "a class of classInd.txt"),
        ("testlist03.txt", "Archery/../../v.avi", "the name of a file, found '../../v.avi'"),
        ("classInd.txt", "2 Archery", "`1 ClassName`"),
    ],
)
def test_malformed_ucf101_lines(ucf101, file, line, message):
    put(ucf101, {f"ucfTrainTestlist/{file}": f"\n{line}\n"})
    with pytest.raises(ValueError, match=rf"{file}, line 2: expected .*{message}"):
        entries("ucf101", ucf101)


@pytest.fixture
def hmdb51(tmp_path):
    for fold in (1, 2, 3):
        marks = {"a b.avi": (1, 2, 0)[fold - 1], "c.avi": 2}
        text = "".join(f"{name} {mark} \n" for name, mark in marks.items())
        put(tmp_path, {f"testTrainMulti_7030_splits/brush_hair_test_split{fold}.txt": text})
        put(tmp_path, {f"testTrainMulti_7030_splits/wave_test_split{fold}.txt": "c.avi 1\n"})
    return touch(tmp_path, "hmdb51_org/brush_hair/a b.avi", "hmdb51_org/brush_hair/c.avi",
                 "hmdb51_org/wave/c.avi")  # fmt: skip


def test_hmdb51(hmdb51):
    listing = read_dataset_lists("hmdb51", hmdb51)
    clips = [(e.split, e.fold, e.id, e.labels[0]) for e in listing.entries]
    assert [row for row in clips if row[1] == 1] == [
        ("train", 1, "brush_hair/a b", "brush_hair"),
        ("test", 1, "brush_hair/c", "brush_hair"),
        ("train", 1, "wave/c", "wave"),
    ]
    assert ("test", 2, "brush_hair/a b", "brush_hair") in clips and len(clips) == 8
    assert {Path(row[3]).parent.name for row in entries("hmdb51", hmdb51)} == {
        "brush_hair", "wave"
    }  # fmt: skip
    assert "1 lines are marked 0: not used in that split" in listing.notes
    put(hmdb51, {"testTrainMulti_7030_splits/wave_test_split2.txt": "c.avi 3\n"})
    with pytest.raises(ValueError, match=r"wave_test_split2.txt, line 1: expected `video.avi 0`"):
        entries("hmdb51", hmdb51)
    (hmdb51 / "testTrainMulti_7030_splits/wave_test_split2.txt").unlink()
    with pytest.raises(ValueError, match=r"wave_test_split2.txt: no such file; hmdb51 needs"):
        entries("hmdb51", hmdb51)


ESC50_NAMES = ('"rain, hard"', "dog")
ESC50 = "filename,fold,target,category,esc10,src_file,take\n" + "".join(
    f"{fold}-{i}-A-{target}.wav,{fold},{target},{ESC50_NAMES[target]},True,{i},A\n"
    for i, (fold, target) in enumerate([(1, 0), (2, 1), (3, 0), (4, 1), (5, 0)])
)


def test_esc50(tmp_path):
    put(tmp_path, {"meta/esc50.csv": ESC50})
    touch(tmp_path, *(f"audio/{line.split(',')[0]}" for line in ESC50.splitlines()[1:]))
    clips = entries("ESC-50", tmp_path)
    assert len(clips) == 25
    assert [row[2] for row in clips if row[:2] == ("test", 2)] == ["2-1-A-1"]
    assert len([row for row in clips if row[:2] == ("train", 2)]) == 4
    assert {row[4] for row in clips} == {("dog",), ("rain_ hard",)}
    assert classes("esc50", tmp_path) == [(0, "rain_ hard", "rain, hard"), (1, "dog", "dog")]
    (tmp_path / "audio/5-4-A-0.wav").unlink()
    assert missing("esc50", tmp_path) == ["5-4-A-0"] * 5
    for line in ("x.wav,6,0,dog,,,", "x.wav,1,0,cat,,,", "../x.wav,1,1,dog,,,", "x.wav,1,1"):
        put(tmp_path, {"meta/esc50.csv": f"{ESC50}{line}\n"})
        with pytest.raises(ValueError, match=r"esc50.csv, line 7: expected"):
            entries("esc50", tmp_path)


@pytest.fixture
def fsd50k(tmp_path):
    folder = "FSD50K.ground_truth"
    put(tmp_path, {
        f"{folder}/vocabulary.csv": "0,Accelerating_and_revving,/m/07q2z82\n1,Bark,/m/05tny_\n",
        f"{folder}/dev.csv": 'fname,labels,mids,split\n64760,"Bark,Accelerating_and_revving",'
                             '"/m/05tny_,/m/07q2z82",train\n16399,Bark,/m/05tny_,val\n',
        f"{folder}/eval.csv": "fname,labels,mids\n37199,Bark,/m/05tny_\n",
    })  # fmt: skip
    return touch(tmp_path, "FSD50K.dev_audio/64760.wav", "FSD50K.dev_audio/16399.wav")


def test_fsd50k(fsd50k):
    assert entries("fsd50k", fsd50k) == [
        (
            "train",
            0,
            "64760",
            "FSD50K.dev_audio/64760.wav",
            ("/m/05tny_", "/m/07q2z82"),
            None,
            None,
        ),
        ("val", 0, "16399", "FSD50K.dev_audio/16399.wav", ("/m/05tny_",), None, None),
    ]  # fmt: skip
    assert missing("fsd50k", fsd50k) == ["37199"]
    assert classes("fsd50k", fsd50k)[1] == (1, "/m/05tny_", "Bark")
    for name, line in (
        ("dev.csv", "1,Bark,/m/05tny_,test"),
        ("dev.csv", "1,Bark,/m/zzz,train"),
        ("eval.csv", "../1,Bark,/m/05tny_"),
        ("vocabulary.csv", "3,Cat,/m/x"),
    ):
        path = fsd50k / "FSD50K.ground_truth" / name
        text = path.read_text()
        path.write_text(f"{text}{line}\n")
        with pytest.raises(ValueError, match=rf"{name}, line \d: expected"):
            entries("fsd50k", fsd50k)
        path.write_text(text)
