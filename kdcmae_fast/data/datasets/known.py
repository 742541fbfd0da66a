"""The published datasets the field uses: layout, splits, metric, normalisation, who uses them.

Figures come from the datasets' own pages and from the papers and recipes named with them; where
nobody published normalisation statistics for the fbank of this package, none are given.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdcmae_fast.data.datasets.actions import read_hmdb51, read_ucf101
from kdcmae_fast.data.datasets.boxes import read_flickr_soundnet, read_vggss
from kdcmae_fast.data.datasets.entries import Listing
from kdcmae_fast.data.datasets.sounds import read_esc50, read_fsd50k, read_fsdd
from kdcmae_fast.data.datasets.youtube import (
    KINETICS_SOUND,
    read_audioset,
    read_kinetics,
    read_vggsound,
)

MEASURE = "measure with `kdcmae doctor`"
CAV_MAE_STATISTICS = (
    "data.dataset_mean=-5.081 data.dataset_std=4.4849 (the defaults; CAV-MAE, arXiv 2210.07839, "
    "for AudioSet and VGGSound)"
)
XKD_STATISTICS = (
    f"{MEASURE} (XKD, arXiv 2211.13929, has -5.3688107 and 4.410007, but for its own 80-bin "
    f"spectrogram)"
)
SEGMENT_NAMES = (
    "videos/<id>_<start, 6 digits>.mp4 (or <id>_<start>.<thousandths>.mp4, "
    "<id>_<start ms>_<end ms>.mp4) cut to the segment, or <id>.mp4 whole; in any subfolder"
)
CAV_MAE_NAMES = "or, prepared already: frame_<k>/<name>.jpg and audio/<name>.wav"
AUDIOSET_LABELS = "class_labels_indices.csv (index,mid,display_name; AudioSet's own)"


@dataclass(frozen=True)
class KnownDataset:
    """What to know of a dataset.

    layout: what is expected under ROOT, a line each. label_csv: how labels.csv is made.
    used_by: systems, and for what. read: from ROOT to its clips.
    """

    title: str
    num_classes: int
    layout: tuple[str, ...]
    label_csv: str
    splits: str
    metric: str
    normalisation: str
    used_by: str
    read: Callable[[Path], Listing]


def _audioset(
    title: str, lists: tuple[str, ...], split: str, splits: str, used_by: str
) -> KnownDataset:
    return KnownDataset(
        title=title,
        num_classes=527,
        layout=(
            *(f"{name} (AudioSet's own, `# ` header)" for name in lists),
            AUDIOSET_LABELS,
            SEGMENT_NAMES,
            CAV_MAE_NAMES,
        ),
        label_csv="the rows of class_labels_indices.csv",
        splits=splits,
        metric="mAP (several labels a clip)",
        normalisation=CAV_MAE_STATISTICS,
        used_by=used_by,
        read=functools.partial(read_audioset, lists=lists, split=split),
    )


def _kinetics(title: str, classes: tuple[str, ...], used_by: str) -> KnownDataset:
    return KnownDataset(
        title=title,
        num_classes=len(classes) or 400,
        layout=(
            "train.csv (label,youtube_id,time_start,time_end,split)",
            "val.csv or validate.csv (the same)",
            "{train,val}/<class>/<id>_<start, 6 digits>_<end, 6 digits>.mp4 (or .avi, ...)",
            CAV_MAE_NAMES,
        ),
        label_csv="the labels in alphabetical order, spaces as _",
        splits="train, val ("
        + ("classes of the XKD lists" if classes else "as the CSVs say")
        + ")",
        metric="top-1",
        normalisation=XKD_STATISTICS,
        used_by=used_by,
        read=functools.partial(read_kinetics, only=classes),
    )


KNOWN: dict[str, KnownDataset] = {
    "audioset_20k": _audioset(
        "AudioSet-20K",
        ("balanced_train_segments.csv",),
        "train",
        "train: 22,176 segments, the balanced list",
        "CAV-MAE, CAV-MAE Sync, KDC-MAE: fine-tuning",
    ),
    "audioset_2m": _audioset(
        "AudioSet-2M",
        ("balanced_train_segments.csv", "unbalanced_train_segments.csv"),
        "train",
        "train: the balanced list and the 2,042,985 unbalanced segments",
        "CAV-MAE, CAV-MAE Sync, KDC-MAE, XKD: pretraining; CAV-MAE, Sync: fine-tuning",
    ),
    "audioset_eval": _audioset(
        "AudioSet evaluation",
        ("eval_segments.csv",),
        "eval",
        "eval: 20,383 segments",
        "CAV-MAE, CAV-MAE Sync, KDC-MAE: classification; 5 clips a class of it: retrieval",
    ),
    "vggsound": KnownDataset(
        title="VGGSound",
        num_classes=309,
        layout=(
            "vggsound.csv (id,start,label,train or test; no header)",
            "class_labels_indices_vgg.csv (CAV-MAE's; optional, for its class numbers)",
            SEGMENT_NAMES,
            CAV_MAE_NAMES,
        ),
        label_csv="vgg_0 ... vgg_308 of class_labels_indices_vgg.csv, or alphabetical",
        splits="train, test; 10 s from each start",
        metric="top-1",
        normalisation=CAV_MAE_STATISTICS,
        used_by="CAV-MAE, CAV-MAE Sync, KDC-MAE: fine-tuning, retrieval (5 clips a class of test); "
        "EZ-VSL, AVL: localisation training",
        read=read_vggsound,
    ),
    "kinetics400": _kinetics(
        "Kinetics-400", (), "XKD: pretraining, fine-tuning and linear evaluation"
    ),
    "kinetics_sound": _kinetics(
        "Kinetics-Sound (32 classes)", KINETICS_SOUND, "XKD: linear audio, video and joint probes"
    ),
    "ucf101": KnownDataset(
        title="UCF101",
        num_classes=101,
        layout=(
            "ucfTrainTestlist/classInd.txt",
            "ucfTrainTestlist/trainlist01.txt ... testlist03.txt",
            "UCF-101/<Class>/v_<Class>_g01_c01.avi",
            CAV_MAE_NAMES,
        ),
        label_csv="the classes of classInd.txt, from 0",
        splits="3 folds of train and test; about half of the classes have no sound",
        metric="top-1, mean of the 3 folds",
        normalisation=XKD_STATISTICS,
        used_by="AV-MAE: pretraining and classification; XKD: fine-tuning and SVM",
        read=read_ucf101,
    ),
    "hmdb51": KnownDataset(
        title="HMDB51",
        num_classes=51,
        layout=(
            "testTrainMulti_7030_splits/<class>_test_split<1..3>.txt",
            "videos/<class>/<name>.avi (or hmdb51_org/)",
            CAV_MAE_NAMES,
        ),
        label_csv="the classes in alphabetical order",
        splits="3 folds of train and test; clips marked 0 belong to neither",
        metric="top-1, mean of the 3 folds",
        normalisation=XKD_STATISTICS,
        used_by="XKD: fine-tuning and SVM",
        read=read_hmdb51,
    ),
    "esc50": KnownDataset(
        title="ESC-50 (sound only)",
        num_classes=50,
        layout=("meta/esc50.csv (filename,fold,target,category,...)", "audio/<filename>"),
        label_csv="targets 0 to 49 and their categories",
        splits="5 folds: each is the test set once, the others train",
        metric="top-1, mean of the 5 folds",
        normalisation=XKD_STATISTICS,
        used_by="XKD: fine-tuning and SVM",
        read=read_esc50,
    ),
    "fsd50k": KnownDataset(
        title="FSD50K (sound only)",
        num_classes=200,
        layout=(
            "FSD50K.ground_truth/vocabulary.csv (index,label,mid; no header)",
            "FSD50K.ground_truth/dev.csv (fname,labels,mids,split)",
            "FSD50K.ground_truth/eval.csv (fname,labels,mids)",
            "FSD50K.dev_audio/<fname>.wav, FSD50K.eval_audio/<fname>.wav",
        ),
        label_csv="the rows of vocabulary.csv",
        splits="train, val (both of dev), eval",
        metric="mAP (several labels a clip)",
        normalisation=XKD_STATISTICS,
        used_by="XKD: fine-tuning and linear evaluation",
        read=read_fsd50k,
    ),
    "fsdd": KnownDataset(
        title="Free Spoken Digit Dataset (sound only)",
        num_classes=10,
        layout=("recordings/<digit>_<speaker>_<take>.wav (or directly under --root)",),
        label_csv="zero to nine",
        splits="train, test (takes 0 to 4 of every digit and speaker)",
        metric="top-1",
        normalisation=f"{MEASURE} (configs/fsdd.yaml has those of its own filterbank)",
        used_by="configs/fsdd.yaml: pretraining on sound alone, linear probe and SVM",
        read=read_fsdd,
    ),
    "flickr_soundnet": KnownDataset(
        title="Flickr-SoundNet (boxes)",
        num_classes=0,
        layout=(
            "flickr_test.csv (id,number; the number is not used)",
            "Annotations/<id>.xml (boxes of three annotators, in 256 x 256)",
            "frames/<id>.jpg, audio/<id>.wav",
        ),
        label_csv="none",
        splits="test: 249 clips",
        metric="cIoU at 0.5 and AUC",
        normalisation=MEASURE,
        used_by="EZ-VSL, AVL: localisation",
        read=read_flickr_soundnet,
    ),
    "vgg_ss": KnownDataset(
        title="VGG-SS (boxes)",
        num_classes=221,
        layout=(
            "vggss.json (a list of file, class, bbox)",
            "vggss_heard_test.csv, vggss_unheard_test.csv (ids; optional)",
            "frames/<id>.jpg, audio/<id>.wav or .flac",
        ),
        label_csv="the classes in alphabetical order",
        splits="test: 5,158 clips; heard, unheard: 110 classes each",
        metric="cIoU at 0.5 and AUC",
        normalisation=MEASURE,
        used_by="EZ-VSL, AVL: localisation; 72 % of it is in their 144k VGGSound training list",
        read=read_vggss,
    ),
}


def find_dataset(name: str) -> tuple[str, KnownDataset]:
    """A dataset by name, however it is written (UCF-101, ucf101); ValueError with those known."""

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    for key, known in KNOWN.items():
        if plain(name) in (plain(key), plain(known.title)):
            return key, known
    raise ValueError(f"no dataset {name!r}; known are {', '.join(KNOWN)}")


def read_dataset_lists(name: str, root: str | Path) -> Listing:
    """The clips of dataset `name` under `root`.

    ValueError of one line for a missing file (with the layout) or a malformed line (with its
    number). Reading `entries` may raise it too.
    """
    key, known = find_dataset(name)
    if not Path(root).is_dir():
        raise ValueError(f"--root {root} is not a folder; {_expected(key, known)}")
    try:
        return known.read(Path(root))
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename}: no such file; {_expected(key, known)}") from None


def _expected(key: str, known: KnownDataset) -> str:
    return f"{key} needs under --root: {'; '.join(known.layout)}"
