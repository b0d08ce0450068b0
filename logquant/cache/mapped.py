"""Page stores in files: contexts larger than memory, on machines without a GPU.

Pages are written once and then only read, so the system keeps in memory those that are read, and writes the others to
the disk. With ``recall`` a step reads few of them.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .storage import Allocator


class MappedAllocator(Allocator):
    """Allocates page stores in files of their own without a name, which go with their tensors.

    Args:
        settings: as for :class:`Allocator`.
        directory: where the files are; not one that is itself in memory, as ``/tmp`` may be.

    Raises:
        NotADirectoryError: there is no such directory.
    """

    def __init__(self, settings: Iterable[object], directory: str | os.PathLike[str]) -> None:
        super().__init__(settings)
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise NotADirectoryError(f"page_directory must be a directory, got {str(self.directory)!r}")

    def pages(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """As :meth:`Allocator.pages`, in a file.

        Raises:
            OSError: the disk has no room.
            ValueError: a device other than the CPU.
        """
        if like.device.type != "cpu":
            raise ValueError(f"page_directory is for caches on the CPU, got tokens on {like.device}")
        nbytes = 4 * math.prod(shape)
        if not nbytes:
            return super().pages(like, shape)
        with tempfile.TemporaryFile(dir=self.directory) as file:
            try:
                _take_space(file.fileno(), nbytes)
            except OSError as error:
                what = f"page_directory {self.directory} must have room for {nbytes:,} more bytes"
                raise OSError(error.errno, f"{what}: {error.strerror}") from None
            mapped = mmap.mmap(file.fileno(), nbytes)
        return torch.frombuffer(mapped, dtype=torch.int32).view(shape)


def _take_space(file: int, nbytes: int) -> None:
    """Make an empty file that large (OSError: the disk has no room)."""
    if hasattr(os, "posix_fallocate"):
        # Writing to what the disk turns out to have no room for would end the process.
        os.posix_fallocate(file, 0, nbytes)
    else:  # macOS
        os.truncate(file, nbytes)
