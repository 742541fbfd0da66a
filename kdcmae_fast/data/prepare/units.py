"""Units: the shards, or equal parts of the CAV-MAE layout, each made as a whole by one process."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kdcmae_fast.data.prepare import cav_mae
from kdcmae_fast.data.prepare.clips import make_clip, probe_seconds, skipped
from kdcmae_fast.data.prepare.inputs import Input
from kdcmae_fast.data.prepare.pool import Tell
from kdcmae_fast.data.prepare.settings import PrepareSettings
from kdcmae_fast.data.prepare.state import locked
from kdcmae_fast.data.shards import PreparedClip, Skipped, write_shard
from kdcmae_fast.data.shards.layout import index_path, read_index, shard_name


class Unit(NamedTuple):
    """Inputs [first, first + len(items)) of all."""

    number: int
    first: int
    items: list[Input]


@dataclass(frozen=True)
class UnitMaker:
    """Makes units in a worker process."""

    root: Path
    settings: PrepareSettings

    def __call__(self, unit: Unit, lost: dict[int, str], tell: Tell) -> bool:
        """Make a unit; False when another process is at it. lost: input -> why it is left out."""
        tell(None, 0)
        with locked(self.root, 1 + unit.number) as mine:
            if not mine or is_complete(self.root, self.settings, unit.number):
                return mine
            results = self._results(unit, lost, tell)
            if self.settings.layout == "shards":
                sound = self.settings.sound
                write_shard(self.root, unit.number, results, first=unit.first, sound=sound)
            else:
                cav_mae.write_unit(self.root, unit.number, unit.items, results, self.settings)
        return True

    def _results(
        self, unit: Unit, lost: dict[int, str], tell: Tell
    ) -> Iterator[PreparedClip | Skipped]:
        left_out = 0
        for number, item in enumerate(unit.items):
            tell(number, left_out)
            if number in lost:
                result: PreparedClip | Skipped = skipped(item, "damaged", lost[number])
            else:
                result = make_clip(item, self.settings)
            left_out += isinstance(result, Skipped)
            tell(None, left_out)  # what is slow from here on is the disk
            yield result


def probe(paths: list[str], lost: dict[int, str], tell: Tell) -> list[float | None]:
    """Seconds of each video, None where unknown; for a worker process."""
    seconds = []
    for number, path in enumerate(paths):
        tell(number, 0)
        seconds.append(None if number in lost else probe_seconds(path))
    tell(None, 0)
    return seconds


def is_complete(root: Path, settings: PrepareSettings, unit: int) -> bool:
    """Whether nothing is left to do for a unit."""
    if settings.layout == "shards":
        return index_path(root, shard_name(unit)).exists()
    return cav_mae.journal_path(root, unit).exists()


def read_lines(root: Path, settings: PrepareSettings, num_units: int) -> Iterable[dict[str, Any]]:
    """One line for each input, all units in order; those of skipped inputs have "skipped"."""
    for unit in range(num_units):
        if settings.layout == "shards":
            yield from read_index(root, shard_name(unit))
        else:
            yield from cav_mae.read_journal(root, unit)
