"""Features as files for other tools: NumPy (.npz, or a folder of .npy) and Parquet."""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from kdcmae_fast.evaluation.features import ClipFeatures
from kdcmae_fast.models.pretrained import replace_file

if TYPE_CHECKING:
    import pyarrow

# Columns in the order of a file; times only with frame-level features.
COLUMNS = ("video_ids", "sample_ids", "labels", "audio", "video", "times")
DIMENSIONS = {"sample_ids": (1,), "labels": (1,), "audio": (2, 3), "video": (2, 3), "times": (2,)}
BATCH_ROWS = 4096  # of a Parquet row group


def save_features(features: ClipFeatures, path: str | Path) -> Path:
    """Write features to `path`: NAME.npz, NAME.parquet, or a folder of .npy files for any other.

    Every form holds video_ids, sample_ids, labels, audio and video (of one modality: that one), and
    of frame-level features times (`ClipFeatures` has the shapes); none is pickled. .npz, .npy:
    NumPy reads them alone, the .npy files also memory-mapped. Parquet (needs pyarrow): one row per
    clip, vectors as lists of fixed length. Each file is replaced at once or not at all. `bad` is
    not kept.

    Returns the path. Errors: ModuleNotFoundError without pyarrow.
    """
    path = Path(path)
    arrays = _arrays(features)
    if path.suffix == ".npz":
        replace_file(path, functools.partial(_into, save=_savez, data=arrays))
    elif path.suffix == ".parquet":
        require_parquet(path)
        replace_file(path, lambda temporary: _write_parquet(arrays, temporary))
    else:
        for name, array in arrays.items():
            replace_file(path / f"{name}.npy", functools.partial(_into, save=np.save, data=array))
        for name in set(COLUMNS) - set(arrays):  # of what was there before
            (path / f"{name}.npy").unlink(missing_ok=True)
    return path


def load_features(path: str | Path) -> ClipFeatures:
    """Read what `save_features` wrote. ValueError, one line, for a file that is something else.

    audio or video is (N, 0) where the file has the other one alone. The arrays of a folder stay on
    the disk until they are used.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; `kdcmae features --output {path}` makes it"
        )
    try:
        arrays = dict(_read(path))
    except (ValueError, OSError, EOFError) as error:  # of pyarrow too: ArrowInvalid is a ValueError
        raise ValueError(f"{path} holds no features: {error}") from error
    missing = [name for name in COLUMNS[:3] if name not in arrays]
    if not missing and not {"audio", "video"} & set(arrays):
        missing = ["audio", "video"]
    if missing:
        raise ValueError(f"{path} holds no features: {', '.join(missing)} not there")
    count = len(arrays["video_ids"])
    for name, dimensions in DIMENSIONS.items():
        array = arrays.get(name)
        if array is not None and (array.ndim not in dimensions or len(array) != count):
            raise ValueError(
                f"{path} holds no features: {name} is {array.shape} beside {count} video_ids"
            )
    none = np.empty((count, 0), np.float32)
    sample_ids, labels, audio, video = (
        torch.from_numpy(arrays.get(name, none)) for name in COLUMNS[1:5]
    )
    times = torch.from_numpy(arrays["times"]) if "times" in arrays else None
    names = tuple(map(str, arrays["video_ids"]))
    return ClipFeatures(names, sample_ids, labels, audio, video, times=times)


def require_parquet(path: str | Path) -> None:
    """ModuleNotFoundError, saying what to do, if `path` is Parquet and pyarrow is not there."""
    if Path(path).suffix != ".parquet":
        return
    try:
        import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} needs pyarrow; `pip install pyarrow` (the extra kdcmae-fast[eval]), or write "
            "a .npz",
            name=error.name,
        ) from error


def _arrays(features: ClipFeatures) -> dict[str, NDArray[Any]]:
    columns = {name: getattr(features, name) for name in DIMENSIONS}
    arrays = {
        name: column.numpy()
        for name, column in columns.items()
        if column is not None and 0 not in column.shape[1:]
    }
    return {"video_ids": np.array(features.video_ids, dtype=np.str_), **arrays}


def _into(path: Path, save: Callable[..., None], data: Any) -> None:
    with path.open("wb") as file:  # given a name, NumPy would add its own ending
        save(file, data)


def _savez(file: BinaryIO, arrays: Mapping[str, NDArray[Any]]) -> None:
    np.savez(file, **arrays)  # type: ignore[arg-type]


def _read(path: Path) -> Mapping[str, NDArray[Any]]:
    if path.is_dir():
        files = [file for name in COLUMNS if (file := path / f"{name}.npy").is_file()]
        # "c": pages of one's own when written to, so that a tensor over them is as any other
        return {file.stem: np.load(file, mmap_mode="c", allow_pickle=False) for file in files}
    if path.suffix == ".parquet":
        require_parquet(path)
        return _read_parquet(path)
    found = np.load(path, allow_pickle=False)
    if not isinstance(found, np.lib.npyio.NpzFile):
        raise ValueError("not a .npz archive")
    with found:
        return {name: found[name] for name in COLUMNS if name in found}


def _write_parquet(arrays: Mapping[str, NDArray[Any]], path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {name: _column(array) for name, array in arrays.items()}
    table = pyarrow.table(columns)
    parquet.write_table(table, os.fspath(path), row_group_size=BATCH_ROWS)


def _column(array: NDArray[Any]) -> "pyarrow.Array":
    """(N,) as it is; (N, D) as lists of D; (N, T, D) as lists of T lists of D."""
    import pyarrow

    column = pyarrow.array(np.ascontiguousarray(array).reshape(-1))
    for size in array.shape[:0:-1]:
        column = pyarrow.FixedSizeListArray.from_arrays(column, size)
    return column


def _read_parquet(path: Path) -> dict[str, NDArray[Any]]:
    from pyarrow import parquet

    table = parquet.read_table(os.fspath(path))
    arrays = {}
    for name in COLUMNS:
        if name not in table.column_names:
            continue
        column = table.column(name).combine_chunks()
        sizes = [len(column)]
        while hasattr(column.type, "list_size"):
            sizes.append(column.type.list_size)
            column = column.flatten()
        arrays[name] = column.to_numpy(zero_copy_only=False).reshape(sizes)
    return {name: np.array(array) for name, array in arrays.items()}  # writable, as torch wants
