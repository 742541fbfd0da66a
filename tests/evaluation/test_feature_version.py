"""What features are made of the same clips by the same weights: EXTRACTION counts its changes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcmae_fast.evaluation import EvaluationSource, feature_cache
from kdcmae_fast.evaluation.feature_cache import EXTRACTION, FrameSettings, find_features
from kdcmae_fast.evaluation.source import open_source

pytest.importorskip("soundfile")
Image = pytest.importorskip("PIL.Image")

OF_VERSION = 2  # the numbers below; with others, count EXTRACTION up and put the new ones here
PRINTS = {
    "kdc_mae": [1.3686, 0.2695, 0.3189, 0.0809],
    "kdc_mae, times": [1.3686, 0.2695, 0.6075, 0.0809],
    "kdc_mae, 3 frames": [1.2651, 1.2278, 0.6075, 0.3189, 0.9309, 0.8921, 0.3477, 0.0809],
    "kdc_mae, synthetic": [0.4789, 0.7864, 1.1813, 0.8892],
    "cav_mae_sync": [
        -0.3624,
        -0.3604,
        -0.378,
        -0.366,
        -0.3947,
        -0.4076,
        -0.5904,
        -0.4287,
        -0.2195,
        -0.5544,
        -0.4998,
        -0.2221,
    ],
    "cav_mae_sync, times": [
        -0.3624,
        -0.378,
        -0.3922,
        -0.366,
        -0.4215,
        -0.4091,
        -0.5904,
        -0.4287,
        -0.2195,
        -0.5544,
        -0.4998,
        -0.2221,
    ],
    "cav_mae_sync, times, compatible": [
        -0.3624,
        -0.3524,
        -0.3524,
        -0.366,
        -0.3524,
        -0.3524,
        -0.5904,
        -0.4287,
        -0.2195,
        -0.5544,
        -0.4998,
        -0.2221,
    ],
}


def fixed_weights(model) -> None:
    """Weights that no generator makes: sines, as the specification's golden models have them."""
    with torch.no_grad():
        for j, (name, tensor) in enumerate(sorted(model.state_dict().items())):
            if "pos_embed" in name:
                continue
            k = torch.arange(tensor.numel(), dtype=torch.float64)
            values = 0.2 * torch.sin(12.9898 * k + 78.233 * j)
            if tensor.ndim == 1 and name.endswith("weight"):
                values += 1
            tensor.copy_(values.view(tensor.shape))


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> Path:
    """plain.json and times.json: two clips of 3 s and 2.5 s, three frames each."""
    import soundfile

    root = tmp_path_factory.mktemp("lists")
    rows = []
    for number, seconds in enumerate((3.0, 2.5)):
        t = np.arange(int(16_000 * seconds)) / 16_000
        sound = 0.3 * np.sin(2 * np.pi * (300 + 500 * number + 200 * t) * t)
        soundfile.write(root / f"{number}.flac", sound, 16_000)
        for k in range(3):
            (root / f"frame_{k}").mkdir(exist_ok=True)
            grey = Image.new("RGB", (40, 32), (60 * k + 20, 200 - 60 * k, 90 * number + 20))
            grey.save(root / f"frame_{k}" / f"{number}.jpg", quality=95)
        wav = str(root / f"{number}.flac")
        rows.append({"video_id": str(number), "wav": wav, "video_path": str(root)})
    (root / "plain.json").write_text(json.dumps({"data": rows}))
    for row in rows:
        row["frame_times"] = [0.0, 2.0, 2.4]
    (root / "times.json").write_text(json.dumps({"data": rows}))
    return root


def prints(make_model, lists: Path, case: str, folder: Path) -> list[float]:
    """A few sums that the features of a case leave."""
    name, *how = case.split(", ")
    model = make_model(name)
    fixed_weights(model)
    model.save_pretrained(folder)
    overrides = ["data.num_workers=0", "data.num_frames=3", "data.dataset_mean=-6"]
    if "synthetic" not in how:
        path = lists / ("times.json" if "times" in how else "plain.json")
        overrides += ["data.source=manifest", f"data.path={path}"]
    if "compatible" in how:
        overrides.append("data.time_base=compatible")
    frames = FrameSettings(3) if name == "cav_mae_sync" or "3 frames" in how else None
    source = EvaluationSource(
        checkpoint=str(folder), overrides=overrides, num_clips=2, device="cpu"
    )
    found = find_features(source, open_source(source), frames).features
    weights = torch.linspace(1, 2, found.audio.shape[-1])
    both = [(side * weights).sum(-1).flatten() for side in (found.audio, found.video)]
    return [round(value, 4) for value in torch.cat(both).tolist()]


@pytest.mark.parametrize("case", PRINTS)
def test_features_that_change_count_the_version_up(make_model, lists, case, tmp_path):
    assert EXTRACTION == OF_VERSION
    assert prints(make_model, lists, case, tmp_path) == pytest.approx(PRINTS[case], abs=2e-3)


def test_every_case_has_features_of_its_own():
    found = [tuple(values) for values in PRINTS.values()]
    for number, one in enumerate(found):
        for other in found[number + 1 :]:
            same = len(one) == len(other) and np.allclose(one, other, atol=4e-3)
            assert not same


def test_the_version_is_in_the_key(model_folder, monkeypatch):
    """A file that an older version kept is not taken for today's."""
    source = EvaluationSource(checkpoint=str(model_folder), num_clips=2, device="cpu")
    opened = open_source(source)
    now = feature_cache.feature_key(source, opened, None)
    monkeypatch.setattr(feature_cache, "EXTRACTION", EXTRACTION - 1)
    assert feature_cache.feature_key(source, opened, None) != now
