"""The CAV-MAE layout: frame_<k>/<name>.jpg, audio/<name>.wav, train.json and labels.csv.

    DIR/train.json           {"data": [{"video_id", "wav", "video_path", "labels", "frame_times"},
                             ...]}; published code does not look at the last one
    DIR/units/000000.jsonl   one line for each input of a unit, as a shard's index; written last

`video_id` in train.json is the safe file name; the unit's line has the id as well.
"""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kdcmae_fast.data.clip import SAMPLE_RATE
from kdcmae_fast.data.prepare.inputs import Input
from kdcmae_fast.data.prepare.settings import PrepareSettings
from kdcmae_fast.data.prepare.state import json_text, write_file
from kdcmae_fast.data.shards import PreparedClip, Skipped
from kdcmae_fast.data.shards.layout import shard_name

UNITS = "units"
TRAIN = "train.json"
UNLABELLED = "unlabelled"  # class of clips without label; the published code needs one for each


def journal_path(root: Path, unit: int) -> Path:
    """The journal of a unit: it is there if and only if the unit is complete."""
    return root / UNITS / f"{shard_name(unit)}.jsonl"


def write_unit(
    root: Path,
    unit: int,
    items: Sequence[Input],
    results: Iterable[PreparedClip | Skipped],
    settings: PrepareSettings,
) -> None:
    """Write the files of a unit, each under a temporary name first, then its journal.

    The next start makes an unfinished unit again, so a kill leaves nothing half written. (A power
    cut may: files are not forced to the disk one by one.)
    """
    scratch = root / UNITS / f"{shard_name(unit)}.partial"
    again = scratch.exists()  # a run that was killed may have made some of these clips
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for folder in ["audio", *(f"frame_{k}" for k in range(settings.num_frames))]:
        (root / folder).mkdir(exist_ok=True)
    lines = []
    for item, result in zip(items, results, strict=True):
        for path in _clip_paths(root, item.name, settings) if again and item.name else ():
            path.unlink(missing_ok=True)
        if isinstance(result, Skipped):
            line = {"skipped": result.reason, "detail": " ".join(result.detail.split())}
        else:
            line = _write_clip(root, scratch, item.name, result, settings)
        about = {"id": item.id, "source": item.source, "labels": list(item.labels)}
        lines.append(json.dumps({**about, **line}, ensure_ascii=False))
    scratch.rmdir()
    data = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
    write_file(journal_path(root, unit), data)


def read_journal(root: Path, unit: int) -> Iterable[dict[str, Any]]:
    """The lines of a unit's journal; ValueError naming a damaged one."""
    path = journal_path(root, unit)
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            try:
                yield json.loads(text)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: damaged journal: {error}") from None


def write_list(root: Path, lines: Iterable[dict[str, Any]], settings: PrepareSettings) -> bool:
    """Write train.json of all clips; returns whether any of them has no label."""
    home = os.path.abspath(root)
    data = [
        {
            "video_id": line["name"],
            "wav": f"{home}/audio/{line['name']}.{settings.sound}",
            "video_path": home,
            "labels": ",".join(line["labels"]) or UNLABELLED,
            "frame_times": line["frame_times"],
        }
        for line in lines
        if "skipped" not in line
    ]
    write_file(root / TRAIN, json_text({"data": data}).encode())
    return any(entry["labels"] == UNLABELLED for entry in data)


def _clip_paths(root: Path, name: str, settings: PrepareSettings) -> list[Path]:
    frames = [root / f"frame_{k}" / f"{name}.jpg" for k in range(settings.num_frames)]
    return [*frames, root / "audio" / f"{name}.{settings.sound}"]


def _write_clip(
    root: Path, scratch: Path, name: str, clip: PreparedClip, settings: PrepareSettings
) -> dict[str, Any]:
    """Write a clip's files; returns its part of the journal line."""
    import soundfile

    temporary = scratch / "file"
    *pictures, sound = _clip_paths(root, name, settings)
    for path, frame in zip(pictures, clip.frames, strict=True):
        temporary.write_bytes(frame)
        temporary.replace(path)
    kind = settings.sound.upper()
    soundfile.write(temporary, clip.waveform, SAMPLE_RATE, format=kind, subtype="PCM_16")
    temporary.replace(sound)
    return {
        "name": name,
        "start": clip.start,
        "seconds": clip.seconds,
        "num_samples": len(clip.waveform),
        "frame_times": [round(float(time), 6) for time in clip.frame_times],
    }
