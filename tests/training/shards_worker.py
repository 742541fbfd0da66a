"""Pretraining as ever, but each rank writes down the clips it saw: SEEN/<rank>.jsonl."""

import json
import os
from pathlib import Path

from kdcmae_fast.data import FrontEnd, RawBatch
from kdcmae_fast.pretrain import main
from kdcmae_fast.training.distributed import leave

log = Path(os.environ["SEEN"]) / f"{os.environ['RANK']}.jsonl"
prepare = FrontEnd.__call__


def noted(self: FrontEnd, raw: RawBatch, device: object = None):
    with log.open("a") as file:
        file.write(json.dumps(raw.sample_ids.tolist()) + "\n")
    return prepare(self, raw, device)


if __name__ == "__main__":
    FrontEnd.__call__ = noted
    leave(main())
