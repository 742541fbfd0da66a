"""Run folders as `kdcmae` leaves them, with every kind of evaluation, written by hand."""

import json
import math
import struct
import wave
import zlib
from pathlib import Path

import pytest

SETTINGS = {
    "config": {
        "name": "kdc_mae",
        "preset": "tiny",
        "model": {"mask_ratio": 0.75, "distill": {"divergence": "kl"}},
        "data": {"source": "synthetic", "path": "", "num_clips": 4000},
        "optim": {"lr": 0.002},
        "train": {"steps": 300, "seed": 0},
    },
    "deepspeed": {"train_micro_batch_size_per_gpu": 64},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "git_commit": "0123456789abcdef",
}
ORIGIN = {"checkpoint": "model", "clips_of": "synthetic, heldout", "seed": 0}


def png(path: Path, colour: tuple[int, int, int] = (32, 99, 155), size: int = 48) -> None:
    """A square picture with a darker square inside."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    dark = bytes(part // 2 for part in colour)
    inner = range(size // 4, size // 2)
    lines = b"".join(
        b"\0" + b"".join(dark if x in inner and y in inner else bytes(colour) for x in range(size))
        for y in range(size)
    )
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def wav(path: Path, hertz: float = 440.0, seconds: float = 0.2) -> None:
    """A tone of 8 kHz, 16 bits."""
    samples = [
        round(8000 * math.sin(2 * math.pi * hertz * n / 8000)) for n in range(int(8000 * seconds))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(struct.pack(f"<{len(samples)}h", *samples))


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_training(run: Path, *, lr: float = 0.002, floor: float = 3.0, steps: int = 300) -> None:
    """config.json, log.jsonl, metrics.json and a model with 6 + 4 parameters."""
    settings = {**SETTINGS, "config": {**SETTINGS["config"], "optim": {"lr": lr}}}
    write_json(run / "config.json", settings)
    records = []
    for step in (1, *range(3, steps + 1, 3)):
        total = floor + 7 * math.exp(-step / 60) + 0.2 * math.sin(step)
        records.append(
            {
                "step": step, "epoch": 0, "samples": 64 * step, "lr": lr * min(1, step / 30),
                "total": total, "mae_audio": total / 3, "mae_video": total / 4,
                "contrastive": total / 5, "kd": 0.04 * math.exp(-step / 40) + 0.0001,
                "clips_per_second": 200.0 + step % 7, "seconds_left": 1.0, "grad_norm": total,
            }
        )  # fmt: skip
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_json(
        run / "metrics.json",
        {
            "command": "pretrain", "steps": steps, "samples": 64 * steps, "world_size": 2,
            "bad_clips": [{"video_id": "clip_7", "reason": "the file ends early"}],
            "final_losses": {"total": floor, "kd": 0.01}, "clips_per_second": 203.0, **settings,
        },
    )  # fmt: skip
    header = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "b": {"dtype": "F32", "shape": [4], "data_offsets": [24, 40]},
            "__metadata__": {"format": "pt"},
        }
    ).encode()
    (run / "model").mkdir()
    tensors = struct.pack("<Q", len(header)) + header + bytes(40)
    (run / "model" / "model.safetensors").write_bytes(tensors)


def write_retrieval(folder: Path, *, recall: float = 0.69, clips: int = 100) -> None:
    row = {"R@1": recall, "R@5": 0.99, "R@10": 1.0, "median_rank": 1.0, "mrr": 0.8}
    chance = {"R@1": 0.01, "R@5": 0.05, "R@10": 0.1, "median_rank": 50.5, "mrr": 0.05}
    examples = []
    for direction in ("audio_to_video", "video_to_audio"):
        items = []
        for place in range(4):
            frame, sound = f"examples/{place}.png", f"examples/{place}.wav"
            png(folder / frame, (40 + 50 * place, 180 - 30 * place, 90), size=24)
            wav(folder / sound, 220.0 * (place + 1))
            items.append({"video_id": f"clip_{place}", "frame": frame, "sound": sound})
        found = [
            {**item, "rank": rank, "similarity": 0.9 - 0.1 * rank, "is_pair": rank == 2}
            for rank, item in enumerate(items[1:], 1)
        ]
        query = {"direction": direction, "rank_of_pair": 2, "query": items[2], "found": found}
        examples.append(query)
    write_json(
        folder / "metrics.json",
        {
            "command": "retrieve", **ORIGIN, "audio_to_video": row, "video_to_audio": row,
            "chance": chance, "num_clips": clips, "ties": "average", "examples": examples,
            "headline": {"R@1 audio->video": recall, "R@1 chance": 0.01}, "bad_clips": [],
        },
    )  # fmt: skip


def write_evaluations(run: Path, *, recall: float = 0.69, accuracy: float = 0.8) -> None:
    """One of each command, and one of a command that nobody knows yet."""
    write_retrieval(run / "retrieval", recall=recall)
    pictures = []
    for place in range(6):
        png(run / "inpainting" / f"{place}.png", (200, 40 * place, 90))
        pictures.append({"file": f"{place}.png", "title": f"clip {place}"})
    wav(run / "inpainting" / "rebuilt.wav")
    sounds = [{"file": "rebuilt.wav", "title": "reconstructed sound"}]
    losses = {"video": 0.475, "audio": 0.607}
    inpainted = {
        "command": "inpaint", **ORIGIN, "losses": losses, "pictures": pictures, "sounds": sounds,
        "headline": {"error, video": 0.475},
    }  # fmt: skip
    write_json(run / "inpainting" / "metrics.json", inpainted)
    png(run / "reconstructions" / "0.png")
    clip = {"clip": "clip_0", "picture": "0.png", "error_per_view": {"video": [0.4, 0.5]}}
    errors = {"command": "reconstruct", **ORIGIN, "mean_error": losses, "clips": [clip]}
    write_json(run / "reconstructions" / "metrics.json", errors)
    png(run / "localization" / "overlay.png")
    overlay = [{"file": "overlay.png", "title": "clip_0, cIoU 0.7"}]
    controls = {
        "model": {"cIoU": 0.62, "AUC": 0.5},
        "centred disc": {"cIoU": 0.4, "AUC": 0.41},
        "whole frame": {"cIoU": 0.2, "AUC": 0.3},
    }
    localized = {
        "command": "localize", **ORIGIN, "scores": controls, "pictures": overlay,
        "headline": {"cIoU": 0.62, "cIoU centred disc": 0.4},
    }  # fmt: skip
    write_json(run / "localization" / "metrics.json", localized)
    matrix = [[8, 1, 1], [0, 9, 1], [2, 1, 7]]
    probed = {
        "command": "probe", **ORIGIN, "confusion": matrix, "class_names": ["dog", "drum", "rain"],
        "folds": [{"fold": 1, "accuracy": 0.79}, {"fold": 2, "accuracy": 0.81}],
        "headline": {"accuracy": accuracy, "chance": 1 / 3},
    }  # fmt: skip
    write_json(run / "probe" / "metrics.json", probed)
    later = {"command": "weigh_the_soul", "grams": 21, "by": {"whom": "MacDougall"}}
    write_json(run / "later" / "metrics.json", later)


@pytest.fixture
def write_png():
    """write_png(path, colour, size)"""
    return png


@pytest.fixture
def write_wav():
    """write_wav(path, hertz, seconds)"""
    return wav


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, ...) -> a whole run folder; see `write_training`, `write_evaluations`."""

    def make(name: str = "first", *, recall: float = 0.69, accuracy: float = 0.8, **training):
        run = tmp_path / name
        run.mkdir()
        write_training(run, **training)
        write_evaluations(run, recall=recall, accuracy=accuracy)
        return run

    return make
