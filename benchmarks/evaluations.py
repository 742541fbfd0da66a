"""Every evaluation of pretrained runs on held-out synthetic clips, and one page to compare them.

    python benchmarks/evaluations.py runs/demo runs/longer --output report.html [--results FILE]

Each RUN is a folder that `kdcmae pretrain` wrote on synthetic clips (`make demo`). The evaluations
are written inside it, as a person would have the commands do it; FILE gets their headline figures.
"""

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from kdcmae_fast.training.provenance import git_commit, versions

# folder inside RUN -> command and options
EVALUATIONS = {
    "retrieval": ("retrieve", "--num-clips", "1000"),
    "probe": ("probe", "--num-clips", "1000", "--test-clips", "500"),
    "inpainting": ("inpaint", "--num-clips", "200"),
    "localization": ("localize", "--video", "1"),
}


def main() -> None:
    """Commands, page, results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page")
    parser.add_argument("--results", type=Path, help="write the headline figures there")
    options = parser.parse_args()

    found = {run.name: evaluate(run) for run in options.runs}
    kdcmae("report", *options.runs, "--output", options.output)
    if options.results:
        record = {
            "what": "evaluations of pretrained runs on held-out synthetic clips",
            "date": datetime.date.today().isoformat(),
            "commit": git_commit(),
            "versions": versions(),
            "evaluations": {name: " ".join(words) for name, words in EVALUATIONS.items()},
            "runs": found,
        }
        options.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def evaluate(run: Path) -> dict[str, Any]:
    """All evaluations of one run; its length and their headline figures."""
    for folder, (command, *words) in EVALUATIONS.items():
        kdcmae(command, "--checkpoint", run, *words, "--output", run / folder)
    finetuned = run / "finetuned"
    if not (finetuned / "metrics.json").exists():
        kdcmae("finetune", f"train.init_from={run / 'model'}", "--output", finetuned)
    kdcmae("classify", "--checkpoint", finetuned, "--output", finetuned / "test")
    training = read(run)
    figures: dict[str, Any] = {name: training[name] for name in ("steps", "samples")}
    for folder in (*EVALUATIONS, "finetuned/test"):
        figures[folder] = read(run / folder)["headline"]
    return figures


def read(folder: Path) -> dict[str, Any]:
    """What a command wrote."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def kdcmae(*words: object) -> None:
    """One command, in a process of its own as a person would run it."""
    command = [sys.executable, "-m", "kdcmae_fast", *map(str, words)]
    print("$ kdcmae", *words, flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
