"""Spoken digits: a model pretrained on sound alone, probed beside untrained models and raw fbanks.

    python benchmarks/fsdd.py FSDD_FOLDER --output runs/fsdd [--results FILE] [key=value ...]

FSDD_FOLDER: the recordings of the Free Spoken Digit Dataset. Makes its lists, pretrains
configs/fsdd.yaml on the training part (without its labels), and probes on the dataset's own split:
the model, the same model untrained under several seeds, and filterbanks pooled over time. Writes
OUTPUT/fsdd.json and FILE. A finished run in OUTPUT is taken up.
"""

import argparse
import dataclasses
import datetime
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from torch import Tensor

import kdcmae_fast
from kdcmae_fast.config import RunConfig
from kdcmae_fast.config_file import load_config
from kdcmae_fast.data import FrontEnd, open_dataset
from kdcmae_fast.data.datasets import write_lists
from kdcmae_fast.data.loader import collate
from kdcmae_fast.evaluation import Fold, probe_features
from kdcmae_fast.models import build_model, from_pretrained
from kdcmae_fast.models.cav_mae import CavMae

ROOT = Path(__file__).resolve().parents[1]
CLASSIFIERS = ("linear", "svm", "knn")
SEEDS = range(5)  # of the untrained models
FINER_BINS = 128  # of a filterbank finer than the model's


def main() -> None:
    """Lists, training, probes, results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder of the recordings")
    parser.add_argument("--output", type=Path, default=Path("runs/fsdd"))
    parser.add_argument("--results", type=Path, help="also write the results there")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="on top of the recipe")
    options = parser.parse_intermixed_args()

    origin = provenance()
    lists = options.output / "lists"
    write_lists("fsdd", options.folder, lists)
    run = options.output / "run"
    seconds = pretrain(run, lists, options.settings)
    record = {
        "what": "pretraining configs/fsdd.yaml, then probes of frozen features",
        "date": datetime.date.today().isoformat(),
        **origin,
        **training_figures(run, seconds),
        **probes(run, lists),
    }
    text = json.dumps(record, indent=1) + "\n"
    for path in filter(None, (options.output / "fsdd.json", options.results)):
        path.write_text(text, encoding="utf-8")


def pretrain(run: Path, lists: Path, settings: list[str]) -> float:
    """Train through the engine in a process of its own; wall seconds, start-up included.

    A finished run is left as it is.
    """
    done = run.with_name("training.json")
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))["seconds"]
    start = time.perf_counter()
    command = [
        sys.executable, str(ROOT / "kdcmae_fast" / "pretrain.py"),
        "--ds_config", str(ROOT / "configs" / "zero2.json"),
        "--recipe", str(ROOT / "configs" / "fsdd.yaml"), "--output", str(run),
        f"data.path={lists / 'train.json'}", *settings,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - start
    done.write_text(json.dumps({"seconds": seconds}), encoding="utf-8")
    return seconds


def training_figures(run: Path, seconds: float) -> dict[str, Any]:
    """Steps, losses and time of the run, and its settings."""
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    names = ("steps", "samples", "start_losses", "final_losses", "clips_per_second")
    figures = {name: metrics[name] for name in names}
    figures["clips_per_second"] = round(figures["clips_per_second"], 1)
    settings = metrics["config"]
    for name in ("path", "label_csv"):  # of this machine
        settings["data"].pop(name)
    return {"settings": settings, **figures, "seconds_in_all": round(seconds)}


def probes(run: Path, lists: Path) -> dict[str, Any]:
    """Accuracy of every classifier on every kind of features."""
    config = run_config(run, lists)
    parts = [read_part(config, lists / f"{name}.json") for name in ("train", "test")]
    fbank = torch.cat([part[0] for part in parts])
    finer = dataclasses.replace(
        config, model=dataclasses.replace(config.model, num_mel_bins=FINER_BINS)
    )
    fine = [read_part(finer, lists / f"{name}.json")[0] for name in ("train", "test")]
    labels = np.concatenate([part[1] for part in parts])
    sizes = [len(part[1]) for part in parts]
    fold = Fold(np.arange(sizes[0]), np.arange(sizes[0], sum(sizes)))

    def scores(name: str, features: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {"features": features.shape[1]}
        for classifier in CLASSIFIERS:
            result = probe_features(features.numpy(), labels, [fold], classifier=classifier)
            row = result["folds"][0]
            found[classifier] = {"accuracy": result["accuracy"], row["parameter"]: row["selected"]}
        print(row_text(name, found), flush=True)
        return found

    def untrained(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return encode(build_model(config.name, config.preset, **vars(config.model)), fbank)

    mean, deviation = fbank.mean(dim=1), fbank.std(dim=1)
    kinds: dict[str, Tensor] = {
        "pretrained": encode(from_pretrained(run / "model"), fbank),
        **{f"untrained, seed {seed}": untrained(seed) for seed in SEEDS},
        "fbank, mean over time": mean,
        "fbank, mean and deviation over time": torch.cat([mean, deviation], dim=1),
        f"fbank of {FINER_BINS} bins, mean over time": torch.cat(fine).mean(dim=1),
    }
    print(row_text("", dict.fromkeys(CLASSIFIERS)))
    rows = {name: scores(name, features) for name, features in kinds.items()}
    return {"train_clips": sizes[0], "test_clips": sizes[1], "chance": 0.1, "probes": rows}


def run_config(run: Path, lists: Path) -> RunConfig:
    """The settings of the run, with labels."""
    saved = json.loads((run / "config.json").read_text(encoding="utf-8"))["config"]
    return load_config(saved, [f"data.label_csv={lists / 'labels.csv'}"])


def read_part(config: RunConfig, path: Path) -> tuple[Tensor, np.ndarray]:
    """Normalised fbanks (N, T, F) and labels (N,) of a list, as the model hears them."""
    data = load_config(
        {"data": {**vars(config.data), "path": str(path)}, "train": {"steps": 1}}
    ).data
    dataset = open_dataset(data, config.model, seed=config.train.seed)
    batch = collate([dataset.read(index, 0) for index in range(len(dataset))])
    fbank = FrontEnd(data, config.model).fbank(batch.waveforms, batch.lengths)
    return fbank, batch.labels.numpy()


def encode(model: CavMae, fbank: Tensor) -> Tensor:
    """(N, T, F) -> (N, D) pooled features."""
    model.eval()
    with torch.inference_mode():
        return torch.cat([model.encode(fbank=part).audio for part in fbank.split(64)])


def provenance() -> dict[str, Any]:
    """Device, versions and commit."""
    git: Callable[..., str] = lambda *words: subprocess.run(  # noqa: E731
        ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": f"{processor()}, {torch.get_num_threads()} thread",
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--short") else ""),
        "versions": {
            "kdcmae_fast": kdcmae_fast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }


def processor() -> str:
    """The CPU's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "CPU")


def row_text(name: str, row: dict[str, Any]) -> str:
    """Accuracies of one kind of features for a terminal; without any the heads of the columns."""
    cells = (f"{row[c]['accuracy']:.1%}" if row[c] else c for c in CLASSIFIERS)
    return f"{name:38}" + "".join(f"{cell:>9}" for cell in cells)


if __name__ == "__main__":
    main()
