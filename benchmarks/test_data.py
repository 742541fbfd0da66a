"""Clips per second and core from storage to what a model takes, and the filterbank alone.

Everything on one thread in one process, all cost counted. Providers take turns batch by batch, so
that whatever else the machine does falls on all of them.
"""

import json
import time
from collections.abc import Callable, Iterator

import published_data as published
import pytest
import torch
from bench_providers import PUBLISHED
from data_clips import IMG_SIZE, make_clips, sound

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data import FrontEnd, kaldi_fbank, open_dataset
from kdcmae_fast.data.loader import collate

pytest.importorskip("kaldi_native_fbank")
pytest.importorskip("soundfile")
pytest.importorskip("PIL")

BATCH = 25


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clips(tmp_path_factory, full):
    """Folder of the clips in all layouts, and how many there are."""
    root, count = tmp_path_factory.mktemp("clips"), 500 if full else BATCH
    make_clips(root, count)
    return root, count


def shard_batches(path: str) -> Callable[[range], tuple[torch.Tensor, torch.Tensor]]:
    """What one batch costs: reading, decoding, putting together, filterbank, normalising."""
    data, model = DataConfig(source="shards", path=path), ModelConfig(img_size=IMG_SIZE)
    dataset, front_end = open_dataset(data, model, seed=0), FrontEnd(data, model)

    def batch(numbers: range) -> tuple[torch.Tensor, torch.Tensor]:
        raw = collate([dataset.read(number, 0) for number in numbers])
        made = front_end(raw)
        return made.fbank, made.frames

    return batch


def test_clips_per_second(clips, benchmark, record):
    root, count = clips
    entries = json.loads((root / "train.json").read_text())["data"]
    providers: dict[str, Callable] = {
        PUBLISHED: lambda numbers: published.batch([entries[i] for i in numbers], IMG_SIZE),
        "shards, FLAC": shard_batches(str(root / "flac")),
        "shards, float16": shard_batches(str(root / "npy")),
    }
    check_same(*(provider(range(4)) for provider in providers.values()))
    seconds: dict[str, list[float]] = {name: [] for name in providers}

    def all_batches() -> None:
        for first in range(0, count, BATCH):
            for name, provider in providers.items():
                start = time.perf_counter()
                provider(range(first, first + BATCH))
                seconds[name].append(time.perf_counter() - start)

    benchmark.group = f"loader, {count} clips of 10 s"
    benchmark.pedantic(all_batches, rounds=1)
    if benchmark.disabled:
        return
    for name, taken in seconds.items():
        per_clip = [value / BATCH for value in taken]
        record(
            provider=name,
            mode="fwd",
            seconds=per_clip,
            clips_per_second=round(count / sum(taken), 1),
            times_published=round(sum(seconds[PUBLISHED]) / sum(taken), 2),
            times_published_best=round(min(seconds[PUBLISHED]) / min(taken), 2),
            cores=1,
        )


def check_same(old: published.Published, flac: tuple, npy: tuple) -> None:
    """The same 16-bit sound gives the same rows; float16 and a second JPEG cost a little."""
    torch.testing.assert_close(flac[0], old.fbank, atol=1e-3, rtol=0)
    assert (npy[0] - old.fbank).abs().mean() < 0.01
    pixels = (old.frames * published.PIXEL_STD + published.PIXEL_MEAN) * 255
    for _, frames in (flac, npy):
        assert (frames - pixels).abs().mean() < 6  # another clip would be 60 off


@pytest.mark.parametrize("provider", ("kaldi-native-fbank", "batched"))
def test_fbank(provider, full, measure):
    """kaldi-native-fbank clip by clip, ours for the batch; both from the same waveforms."""
    batch = 32 if full else 4
    waveforms = torch.stack([torch.from_numpy(sound(number)) for number in range(batch)])

    def one_by_one() -> torch.Tensor:
        return torch.stack([published.kaldi_native_fbank(w.numpy(), 16_000) for w in waveforms])

    forward = one_by_one if provider != "batched" else lambda: kaldi_fbank(waveforms)
    measure(f"fbank 10 s B={batch}", provider, forward, (), one_by_one(), 1e-3)
