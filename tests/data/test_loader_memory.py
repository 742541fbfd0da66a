"""Memory does not grow with the number of clips streamed."""

import pytest

pytest.importorskip("PIL")
data_memory = pytest.importorskip("data_memory", reason="needs psutil")

FLAT = 10.0  # MB that either may grow by after the start; the clips' waveforms would be 250


@pytest.mark.slow
def test_ten_thousand_clips_from_shards(tmp_path):
    data_memory.write_clips(tmp_path, 10_000)
    points = list(data_memory.stream(tmp_path, 10_000, every=500))
    assert [point.clips for point in points] == list(range(500, 10_001, 500))
    settled = [point for point in points if point.clips > 2 * data_memory.WINDOW]
    first, rest = settled[0], settled[1:]
    assert max(point.main_mb for point in rest) < first.main_mb + FLAT, points
    assert max(point.workers_mb for point in rest) < first.workers_mb + FLAT, points
