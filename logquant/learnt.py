"""What is learnt about a model once, for all its sequences, and its file."""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedConfig
from typing_extensions import Self

from .files import digest, fingerprint, read, write


class Learnt(ABC):
    """Tensors that were made for a model. They never change, so caches and their copies share them.

    Attributes:
        what: the kind of file, and what errors call it.
        file_version: of its files.
        model: what identifies the model (:func:`logquant.files.fingerprint`).
    """

    what: ClassVar[str]
    file_version: ClassVar[int] = 1
    model: dict[str, str]

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __deepcopy__(self, memo: object) -> Self:
        return self

    @functools.cached_property
    def _identity(self) -> str:
        return digest(*self.state())

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:
        """Refuse another model than that of which it was learnt (ValueError).

        Args:
            config: the model's configuration.
            layers: its layers with full attention.
        """
        # Not its weights: rounded to another dtype they differ, and what was learnt serves them, too.
        if self.model.get("config") != fingerprint(config)["config"]:
            raise ValueError(f"{self.what} was made for another model: its config differs from that of the model given")

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of it, as the tensors and the description of a file."""

    @classmethod
    @abstractmethod
    def from_state(cls, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`state`.

        Raises:
            ValueError: a description or tensors that lack something, or are of something else.
        """

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file. A file that is there is replaced once the new one is complete.

        Raises:
            OSError: the file cannot be written; nothing is left of it.
        """
        write(path, self.what, *self.state())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that :meth:`save` has written.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a damaged file, or one of another kind or format version.
        """
        return cls.from_state(*read(path, cls.what, cls.file_version))
