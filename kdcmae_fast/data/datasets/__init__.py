"""Published datasets: what they look like on disk, and readers of their own annotation formats."""

from kdcmae_fast.data.datasets.boxes import ClipBoxes, read_flickr_boxes, read_vggss_boxes
from kdcmae_fast.data.datasets.entries import Entry, LabelClass, Listing
from kdcmae_fast.data.datasets.known import KNOWN, KnownDataset, find_dataset, read_dataset_lists
from kdcmae_fast.data.datasets.write import dataset_text, datasets_table, write_lists

__all__ = [
    "KNOWN",
    "ClipBoxes",
    "Entry",
    "KnownDataset",
    "LabelClass",
    "Listing",
    "dataset_text",
    "datasets_table",
    "find_dataset",
    "read_dataset_lists",
    "read_flickr_boxes",
    "read_vggss_boxes",
    "write_lists",
]
