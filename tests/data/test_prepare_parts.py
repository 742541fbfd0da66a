"""The parts of `kdcmae prepare`: grids and presets, lists, names, settings, shares, cutting."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcmae_fast.data.manifest import read_label_csv
from kdcmae_fast.data.prepare.clips import make_clip
from kdcmae_fast.data.prepare.command import parse_share
from kdcmae_fast.data.prepare.grids import choose_frames
from kdcmae_fast.data.prepare.inputs import Input, finish_inputs, label_rows, read_sources
from kdcmae_fast.data.prepare.names import LONGEST, SafeNames
from kdcmae_fast.data.prepare.run import prepare
from kdcmae_fast.data.prepare.settings import PRESETS, PrepareSettings, make_settings
from kdcmae_fast.data.prepare.state import begin, locked
from kdcmae_fast.data.shards import PreparedClip, Skipped
from kdcmae_fast.data.shards.layout import read_index

pytest.importorskip("av")
pytest.importorskip("soundfile")

DEFAULTS = PrepareSettings()
SMALL = PrepareSettings(img_size=32, clips_per_shard=4)


@pytest.mark.parametrize("rate, count", [(30, 300), (25, 251), (29.97, 300), (12.5, 125), (24, 97)])
def test_grids_are_the_published_ones(rate, count):
    times = np.arange(count) / rate
    n = min(count, int(10 * rate))
    seconds = choose_frames("seconds", 10, times, rate, 10.0)
    assert seconds.tolist() == [int(i * n / 10) for i in range(10)]
    ends = choose_frames("ends", 16, times, rate, 10.0)
    assert ends.tolist() == np.linspace(0, count - 1, 16).astype(int).tolist()
    assert ends[0] == 0 and ends[-1] == count - 1
    shown = choose_frames("fps:8", 80, times, rate, 10.0)
    length = min(80, int(np.ceil(count / rate * 8 - 1e-3)))
    assert shown.tolist() == [min(int(k / 8 * rate + 1e-6), count - 1) for k in range(length)]
    assert choose_frames("stride:4", 80, times, rate, 10.0).tolist() == [*range(0, count, 4)][:80]


def test_too_few_frames_are_repeated_in_order():
    times = np.arange(3) / 10
    assert choose_frames("seconds", 10, times, 10, 10.0).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert choose_frames("ends", 5, times, 10, 10.0).tolist() == [0, 0, 1, 1, 2]
    assert choose_frames("ends", 1, times, 10, 10.0).tolist() == [0]


@pytest.mark.parametrize(
    ("preset", "frames", "size"),
    [
        ("cav_mae", [3 * i for i in range(10)], (224, 224)),
        ("cav_mae_sync", [29 * i // 15 for i in range(16)], (224, 224)),
        ("xkd", [10 * k // 8 for k in range(24)], (168, 112)),
        ("videomae", [*range(0, 30, 4)], (384, 256)),
    ],
)
def test_presets_take_the_right_frames_at_the_right_times(
    tmp_path, make_video, preset, frames, size
):
    import io

    from PIL import Image

    path = make_video(tmp_path / "a.mp4", seconds=3.0)
    clip = make_clip(Input("a", "a.mp4", str(path)), make_settings(preset))
    assert isinstance(clip, PreparedClip)
    assert clip.frame_times == pytest.approx([k / 10 for k in frames], abs=1e-3)
    pictures = [Image.open(io.BytesIO(data)) for data in clip.frames]
    assert {picture.size for picture in pictures} == {size}
    right = [np.asarray(picture)[:, -size[0] // 3 :].mean() for picture in pictures]
    assert right == pytest.approx([20 + 7 * k for k in frames], abs=3)
    assert len(clip.waveform) == pytest.approx(48_000, abs=200)


def test_a_time_range_takes_that_part(tmp_path, make_video):
    path = make_video(tmp_path / "a.mp4", seconds=3.0)
    item = Input("a", "a.mp4", str(path), start=1.0, seconds=1.0)
    clip = make_clip(item, PrepareSettings(num_frames=5, grid="ends", img_size=32))
    assert isinstance(clip, PreparedClip)
    assert (clip.start, clip.seconds) == (1.0, 1.0)
    assert clip.frame_times == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.9], abs=1e-3)
    late = make_clip(Input("a", "a.mp4", str(path), start=9.0), SMALL)
    assert isinstance(late, Skipped) and late.reason == "bad_time_range"


def test_sound_of_every_rate_is_the_same_tone(tmp_path, make_video):
    """make_video's chirp passes 700 Hz after 1 s; resampling keeps it there."""
    for rate, layout in ((8000, "mono"), (22_050, "stereo"), (48_000, "5.1")):
        path = make_video(tmp_path / f"{rate}.mp4", seconds=2.0, rate=rate, layout=layout)
        clip = make_clip(Input("a", "a", str(path)), SMALL)
        assert isinstance(clip, PreparedClip) and clip.waveform.dtype == np.float32
        part = clip.waveform[15_200:16_800] * np.hanning(1600)
        assert np.abs(np.fft.rfft(part)).argmax() * 10 == pytest.approx(700, abs=20)


def write_csv(path: Path, *rows: str) -> str:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def test_csv_lists(tmp_path):
    table = write_csv(
        tmp_path / "list.csv",
        "path,start,end,labels,split",
        'a/x.mp4,1.5,4,"/m/a, /m/b",train',
        "a/x.mp4,10,20,/m/b,train",
        "y z.mp4,,,,test",
        "a/x.mp4,1.5,9,/m/a,train",
        "a/x.mp4,5,4,/m/a,train",
        "a/x.mp4,nan,4,/m/a,train",
        "a/x.mp4,one,4,/m/a,train",
        "a/x.mp4,-1,4,/m/a,train",
    )
    found = read_sources([table], DEFAULTS)
    assert found.notes == [f"{table}: column 'split' is not used"]
    inputs = finish_inputs(found.inputs, "given")
    assert [item.id for item in inputs[:4]] == [
        "a/x_1.500", "a/x_10.000", "y z", "a/x_1.500",
    ]  # fmt: skip
    first = inputs[0]
    assert (first.start, first.seconds, first.labels) == (1.5, 2.5, ("/m/a", "/m/b"))
    assert first.path == str(tmp_path / "a/x.mp4") and first.source == "a/x.mp4"
    assert [item.skip and item.skip[0] for item in inputs] == [
        None, None, None, "duplicate_id", *["bad_time_range"] * 4,
    ]  # fmt: skip
    assert label_rows(inputs, "") == [(0, "/m/a", "/m/a"), (1, "/m/b", "/m/b")]


def test_csv_of_ids_finds_files_by_name(tmp_path):
    media = tmp_path / "media" / "deep"
    media.mkdir(parents=True)
    for name in ("abc.mp4", "abc.json", "-x_000030.mkv"):
        (media / name).touch()
    table = write_csv(
        tmp_path / "list.csv",
        "YTID, start_seconds, end_seconds, label",
        'abc, 30.000, 40.000, "people sobbing, crying"',
        "-x, 30, 40, b",
        "gone, 1, 2, b",
    )
    found = read_sources([table], DEFAULTS, str(tmp_path / "media")).inputs
    assert [item.id for item in found] == ["abc_000030", "-x_000030", "gone_000001"]
    assert (found[0].start, found[0].seconds, found[0].path) == (30, 10, str(media / "abc.mp4"))
    assert (found[1].start, found[1].seconds) == (0, 10)  # the file is the segment
    assert found[2].skip is not None and found[2].skip[0] == "missing"
    assert found[0].labels == ("people sobbing_ crying",)
    with pytest.raises(ValueError, match="names videos by id; give their folder as --media-root"):
        read_sources([table], DEFAULTS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a.mp4,1,2"], "the first line must name the columns"),
        (["path,start", "a.mp4"], "line 2: not as many values"),
        (["path,file", "a,b"], "two columns for path"),
        (["path,start", ",3"], "line 2: neither a path nor an id"),
        (["path"], "no videos there"),
    ],
)
def test_bad_csv_lists_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_sources([write_csv(tmp_path / "list.csv", *rows)], DEFAULTS)


def test_labels_must_be_in_the_given_csv(tmp_path):
    table = write_csv(tmp_path / "classes.csv", "index,mid,display_name", "7,/m/b,Bee")
    assert label_rows([Input("a", "a", "a", labels=("/m/b",))], table) == [(7, "/m/b", "Bee")]
    with pytest.raises(ValueError, match=r"label '/m/a' is not in"):
        label_rows([Input("a", "a", "a", labels=("/m/a",))], table)


def test_order_does_not_depend_on_the_order_of_the_list():
    items = [Input(f"clip{number}", "a", "") for number in range(50)]
    shuffled = [item.id for item in finish_inputs(items, "shuffled")]
    assert shuffled == [item.id for item in finish_inputs(items[::-1], "shuffled")]
    assert shuffled != sorted(shuffled) and sorted(shuffled) == sorted(item.id for item in items)
    assert [item.id for item in finish_inputs(items, "given")] == [item.id for item in items]


IDS = ["a/b", "a\\b", "a%2Fb", "..", ".", ".a", "-rf", "a\nb", "a\0b", "", " a", "a ", "a:b", "ü"]
IDS += [
    "A",
    "a",
    "é",
    "e\u0301",
    "名前",
    "x" * 300,
    "x" * 299 + "y",
    "X" * 300,
    "名" * 100,
    "%",
    "~",
]


@given(st.lists(st.text(), unique=True))
def test_names_are_safe_and_differ(more):
    names = SafeNames()
    taken = set()
    for identity in dict.fromkeys(IDS + more):
        name = names.add(identity)
        assert name.casefold() not in taken
        taken.add(name.casefold())
        assert len(name.encode("utf-8")) <= LONGEST + 17
        assert name not in ("", ".", "..") and name[0] not in ".-" and name == name.strip()
        assert not set(name) & set('/\\\n\0<>:"|?*')


def test_odd_ids_and_paths_are_inputs_like_any_other():
    items = finish_inputs([Input("\ud800", "a", "a\0b"), Input("", "b", "")], "shuffled")
    results = [make_clip(item, SMALL) for item in items]
    assert all(isinstance(result, Skipped) for result in results)


def test_plain_names_stay():
    names = SafeNames()
    for identity in ("glLQrEijrKg_000300", "00W1lcxW-WU_40.000", "ünï cödé 名前 (1)"):
        assert names.add(identity) == identity


def test_presets_are_valid_and_values_replace_theirs():
    for preset in PRESETS:
        make_settings(preset)
    assert make_settings("cav_mae_sync", img_size=96, grid=None).grid == "ends"
    assert make_settings("cav_mae", layout="cav_mae").sound == "wav"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": "fps:0"}, "--grid fps:0 must be"),
        ({"grid": "fps:8", "layout": "cav_mae"}, "--layout cav_mae needs as many frames"),
        ({"sound": "npy", "layout": "cav_mae"}, "--sound npy must be wav or flac"),
        ({"num_frames": 101}, "--num-frames 101 must be between 1 and 100"),
        ({"seconds": 0.1}, "--seconds 0.1 must be between"),
        ({"quality": 100}, "--quality 100 must be"),
        ({"clips_per_shard": -1}, "--clips-per-shard -1 must be"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make_settings("cav_mae", **changes)


def test_shares():
    assert parse_share("1/4", {}) == (1, 4)
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "3"}
    array |= {"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_STEP": "2"}
    assert parse_share("slurm", array) == (2, 3)
    for text in ("4/4", "1", "-1/2", "a/b"):
        with pytest.raises(ValueError, match=f"--shard {text}"):
            parse_share(text, {})
    with pytest.raises(ValueError, match="not in a Slurm job array"):
        parse_share("slurm", {})


def test_a_long_video_is_cut_into_clips(tmp_path, make_video):
    (tmp_path / "in").mkdir()
    make_video(tmp_path / "in" / "long.mp4", seconds=2.7)
    make_video(tmp_path / "in" / "short.mp4", seconds=0.9)
    make_video(tmp_path / "in" / "rest.mp4", seconds=1.2)
    settings = PrepareSettings(
        cut="all", seconds=1.0, num_frames=2, img_size=32, order="given", layout="cav_mae"
    )
    outcome = prepare([str(tmp_path / "in")], tmp_path / "out", settings, workers=2)
    assert outcome.report is not None and outcome.report.clips == outcome.report.inputs == 5
    text = (tmp_path / "out" / "units" / "000000.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [(line["id"], line["start"]) for line in lines] == [
        ("long_0.000", 0), ("long_1.000", 1), ("long_2.000", 2), ("rest", 0), ("short", 0),
    ]  # fmt: skip
    assert [line["seconds"] for line in lines] == pytest.approx([1, 1, 0.7, 1, 0.9], abs=0.05)


def test_labels_of_a_list_end_in_the_dataset(tmp_path, make_video):
    for name in "ab":
        make_video(tmp_path / f"{name}.mp4", seconds=0.6)
    table = write_csv(tmp_path / "list.csv", "path,labels", 'a.mp4,"/m/x,/m/y"', "b.mp4,/m/y")
    outcome = prepare([table], tmp_path / "out", SMALL, workers=1)
    assert outcome.report is not None and outcome.report.unlabelled == 0
    assert read_label_csv(str(tmp_path / "out" / "labels.csv")) == {"/m/x": 0, "/m/y": 1}
    lines = {line["id"]: line["labels"] for line in read_index(tmp_path / "out", "000000")}
    assert lines == {"a": ["/m/x", "/m/y"], "b": ["/m/y"]}
    with (tmp_path / "out" / "skipped.csv").open() as file:
        assert list(csv.reader(file)) == [["id", "source", "reason", "detail"]]


HOLDER = """
import sys
from pathlib import Path
from kdcmae_fast.data.prepare.state import begin, locked

with locked(Path(sys.argv[1]), 1) as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


def test_a_unit_that_another_run_makes_is_left_to_it(tmp_path, make_video, monkeypatch):
    """Locks hold across processes, byte by byte, and end with their process."""
    (tmp_path / "prepare.json").touch()
    monkeypatch.setattr("kdcmae_fast.data.prepare.state.PATIENCE", 0.2)
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout.readline() == "True\n"
        with locked(tmp_path, 1) as mine:
            assert not mine
        with locked(tmp_path, 2) as mine:
            assert mine
        process.kill()
        process.wait()
        with locked(tmp_path, 1) as mine:
            assert mine


@pytest.mark.parametrize(
    ("name", "codec", "sound", "options"),
    [
        ("a.ts", "mpeg2video", "mp2", {"bf": "2"}),  # seeks land too late
        ("a.mpg", "mpeg2video", "mp2", {"bf": "2"}),  # times are guessed after a seek
        ("a.avi", "mpeg4", "mp2", {"bf": "2"}),  # no presentation times
        ("a.mkv", "mpeg4", "aac", {}),
    ],
)
@pytest.mark.parametrize("start", [0.0, 1.3])
def test_frames_of_every_container_have_their_times(tmp_path, name, codec, sound, options, start):
    """Frame i is grey 20 + 3 i: what is seen agrees with the time, to two frames of 40 ms."""
    import io
    from fractions import Fraction

    import av
    from PIL import Image

    path = tmp_path / name
    with av.open(str(path), "w") as out:
        video = out.add_stream(codec, rate=25, options=options)
        audio = out.add_stream(sound, rate=44_100, layout="stereo")
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        video.codec_context.gop_size = 12
        video.bit_rate = 4_000_000
        for i in range(60):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 + 3 * i, np.uint8))
            frame.pts, frame.time_base = i, Fraction(1, 25)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        tone = np.tile(0.3 * np.sin(np.arange(105_840) * 0.05), (2, 1)).astype(np.float32)
        kind = audio.codec_context.format.name
        fit = av.AudioResampler(format=kind, layout="stereo", rate=44_100, frame_size=1152)
        whole = av.AudioFrame.from_ndarray(tone, format="fltp", layout="stereo")
        whole.sample_rate, whole.pts, whole.time_base = 44_100, 0, Fraction(1, 44_100)
        for frame in [*fit.resample(whole), *fit.resample(None)]:
            out.mux(audio.encode(frame))
        out.mux(audio.encode(None))
    settings = PrepareSettings(num_frames=12, grid="ends", img_size=64)
    clip = make_clip(Input("a", name, str(path), start=start), settings)
    assert isinstance(clip, PreparedClip), clip
    greys = np.array([np.asarray(Image.open(io.BytesIO(data))).mean() for data in clip.frames])
    seen = (greys - 20) / 3 / 25
    assert seen == pytest.approx(np.array(clip.frame_times) + start, abs=0.085)
    assert clip.frame_times[0] < 0.1 and clip.frame_times[-1] > clip.seconds - 0.2


def test_what_a_folder_was_begun_with_is_checked(tmp_path):
    begin(tmp_path, {"quality": 75, "clips_per_shard": 16}, "digest", 500)
    begin(tmp_path, {"quality": 75, "clips_per_shard": 16}, "digest", 500)
    with pytest.raises(ValueError, match=r"--quality is 90, but .* begun with 75"):
        begin(tmp_path, {"quality": 90, "clips_per_shard": 17}, "other", 501)
    with pytest.raises(ValueError, match=r"the inputs are not those .* \(501 now, 500 then"):
        begin(tmp_path, {"quality": 75, "clips_per_shard": 17}, "other", 501)
    with pytest.raises(ValueError, match=r"--clips-per-shard is 17"):
        begin(tmp_path, {"quality": 75, "clips_per_shard": 17}, "digest", 500)
    (tmp_path / "more").touch()
    (tmp_path / "prepare.json").write_text("{")
    with pytest.raises(ValueError, match="prepare.json: damaged"):
        begin(tmp_path, {}, "digest", 500)
