"""Memory of a loader over 10,000 clips: one row with the curve."""

import data_memory
import pytest

pytest.importorskip("PIL")


def test_memory(tmp_path, full, benchmark, record):
    count = 10_000 if full else 1000
    data_memory.write_clips(tmp_path, count)
    points: list[data_memory.Point] = []

    def run() -> None:
        points.extend(data_memory.stream(tmp_path, count, every=500))

    benchmark.group = f"loader memory, {count} clips"
    benchmark.pedantic(run, rounds=1)
    assert len(points) == count // 500
    record(
        provider="shards, 2 workers",
        mode="fwd",
        clips=[point.clips for point in points],
        main_mb=[point.main_mb for point in points],
        workers_mb=[point.workers_mb for point in points],
    )
