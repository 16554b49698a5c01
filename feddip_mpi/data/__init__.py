"""Data: readers of the known formats, your own data by import path, the split over clients, augmentation.

Images stay uint8 from file to device; they are scaled and normalised batch by batch. Knows neither MPI nor HDF5.
"""

from feddip_mpi.data.dataset import Dataset, channel_statistics, from_arrays
from feddip_mpi.data.loading import NAMES, load, outline_of, shape_of
from feddip_mpi.data.places import Location, find

__all__ = [
    "NAMES",
    "Dataset",
    "Location",
    "channel_statistics",
    "find",
    "from_arrays",
    "load",
    "outline_of",
    "shape_of",
]
