"""What a fine-tuned model folder says of its head: classifier.json beside config.json."""

import json
import os
from pathlib import Path
from typing import NamedTuple

from kdcmae_fast.data.classes import Classes
from kdcmae_fast.models.pretrained import replace_file

CLASSIFIER = "classifier.json"


class ClassifierRecord(NamedTuple):
    """mode: what the model was given in training. loss: bce or cross_entropy. classes: its own."""

    mode: str
    loss: str
    classes: Classes

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write `folder`/classifier.json."""
        content = {"mode": self.mode, "loss": self.loss, "classes": self.classes._asdict()}
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        replace_file(Path(folder) / CLASSIFIER, lambda path: path.write_text(text, "utf-8"))


def read_record(folder: str | os.PathLike[str]) -> ClassifierRecord | None:
    """The record in `folder`; None without one, ValueError naming a file that is not one."""
    path = Path(folder) / CLASSIFIER
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        classes = Classes(*(tuple(content["classes"][name]) for name in Classes._fields))
        return ClassifierRecord(content["mode"], content["loss"], classes)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from None
