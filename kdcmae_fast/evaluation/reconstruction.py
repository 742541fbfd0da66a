"""The quick form of inpainting: pictures of clips under the masks of training."""

from pathlib import Path
from typing import Any

from kdcmae_fast.evaluation.inpainting import Inpainting
from kdcmae_fast.evaluation.source import (
    EvaluationSource,
    listed_bad,
    open_source,
    write_metrics,
)
from kdcmae_fast.figure import require_matplotlib
from kdcmae_fast.messages import require_folder


def reconstruct(source: EvaluationSource, output: str | Path) -> dict[str, Any]:
    """Draw what the model makes of masked clips: OUTPUT/<clip>.png and OUTPUT/metrics.json.

    source.num_clips=None draws 8 clips. The masks are the model's own of step 0, all its views;
    `inpaint` takes others. Returns what metrics.json holds.
    """
    require_matplotlib("the reconstruction pictures")
    require_folder(output)
    opened = open_source(source)
    clips = Inpainting(opened, output, hiding=None, num_pictures=None, sounds=False)
    bad = clips.run(source, default_clips=8)
    metrics = {
        "command": "reconstruct",
        **opened.described,
        **clips.metrics(),
        **listed_bad(bad.rows()),
    }
    write_metrics(metrics, output)
    return metrics
