"""Datasets, ready to train on: each is decoded once a host and shared by all its processes.

dataset = rankwise.data.prepare("synthetic:10000")
dataset.train.images    # uint8 [10000, 32, 32, 3], a read-only memory map
"""

from rankwise.data.cache import Prepared, prepared
from rankwise.data.cache_folder import writable_folder
from rankwise.data.dataset import Dataset, Split
from rankwise.data.registry import check, check_of, known, prepare, prepare_of
from rankwise.data.sheet import draw_sheet

__all__ = [
    "Dataset",
    "Prepared",
    "Split",
    "check",
    "check_of",
    "draw_sheet",
    "known",
    "prepare",
    "prepare_of",
    "prepared",
    "writable_folder",
]
