"""What a layer of a cache can be asked about what it holds."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..attention.call import AttentionCall
from ..attention.units import AS_THEY_ARE
from ..attention.view import KVView, View
from ..config import LogQuantConfig
from ..format import PageFormat
from ..recall.reading import Recall
from ..recall_spec import RecallSpec
from .drafts import Speculation
from .held import Held
from .layout import Rows
from .plain_steps import PlainStep
from .read_only import ReadOnly, refuse_writes
from .shared import Shared
from .uncommitted import Uncommitted


class LayerContents(CacheLayerMixin):
    """Committed tokens, which are held, and uncommitted ones.

    Attributes:
        config: what to keep exact and how to store the rest.
        shared: what the layers of a cache have in common.
        format: the page format; not before the first update.
        speculation: of tokens that may be taken back; None if none may.
        version: another number whenever what attention would see has changed.
        recall: what a query reads of the pages; None: all.
        plain_step: the newest plain step, until somebody looks.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = True
    config: LogQuantConfig
    shared: Shared
    format: PageFormat
    speculation: Speculation | None
    version: int
    recall: RecallSpec | None
    plain_step: PlainStep | None
    dtype: torch.dtype
    _empty: Rows
    _length: int
    _held: Held
    _uncommitted: Uncommitted | None
    # Whether steps may be plain.
    _steps_plainly = True

    def __repr__(self) -> str:
        if not self.is_initialized:
            return "LogQuantLayer(empty)"
        return f"LogQuantLayer(tokens={self.length}, packed={self.rows.packed}, exact={self.rows.exact})"

    @property
    def held(self) -> Held:
        """The committed tokens; not before the first update."""
        self._look()
        return self._held

    @held.setter
    def held(self, held: Held) -> None:
        self._held = held

    @property
    def uncommitted(self) -> Uncommitted | None:
        """Tokens that have come but not taken their places."""
        self._look()
        return self._uncommitted

    @uncommitted.setter
    def uncommitted(self, uncommitted: Uncommitted | None) -> None:
        self._uncommitted = uncommitted

    def _look(self) -> None:
        """Learn of steps that have been taken."""
        if (step := self.plain_step) is not None:
            uncommitted = step.tell(self._held, self.shared.allocator)
            self._held.rows = self.shared.same_for_all(self._held.rows)
            vars(self).update(_uncommitted=uncommitted, plain_step=None)

    @property
    def rows(self) -> Rows:
        """Where the committed tokens of each row are."""
        return self.held.rows if self.is_initialized else self._empty

    @property
    def batch_size(self) -> int:
        if not self.is_initialized:
            raise AttributeError("batch_size is not known before the first update")
        return self.held.storage.window_k.shape[0]

    @property
    def length(self) -> int:
        """Positions, those of uncommitted tokens included."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys ``[B, H, T, D]`` and values ``[B, H, T, Dv]``, dequantised, by position; 0 where padding was.

        Uncommitted tokens are exact.
        """
        self.held.check_intact()
        if (waiting := self.uncommitted) is not None:
            both = self._view(waiting.exact.keys, waiting.exact.values, waiting.new).dense()
            real = self._real_positions(waiting)
            return both if real is None else (_without_padding(both[0], real), _without_padding(both[1], real))
        exact, storage = slice(0, self.rows.exact), self.held.storage
        return self._view(storage.window_k[:, :, exact], storage.window_v[:, :, exact], 0).dense()

    # transformers' layers have attributes of these names.
    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """What a ``DynamicLayer`` would hold, as far as it is still known; made anew at every access, and read-only."""
        return self.dense()[0].as_subclass(ReadOnly) if self.is_initialized else None

    @keys.setter
    def keys(self, _: Any) -> NoReturn:
        refuse_writes()

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return self.dense()[1].as_subclass(ReadOnly) if self.is_initialized else None

    @values.setter
    def values(self, _: Any) -> NoReturn:
        refuse_writes()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors this layer holds; a page store that copies share counts for each."""
        if not self.is_initialized:
            return 0
        return self.held.nbytes + (self.uncommitted.nbytes if self.uncommitted else 0)

    @property
    def map_nbytes(self) -> int:
        """Bytes of the bit allocation of this layer's sequences; that of a calibration belongs to none of them."""
        return self.held.advice.map_nbytes if self.is_initialized else 0

    @property
    def full_precision_nbytes(self) -> int:
        """Bytes of the same tokens in a ``DynamicCache``."""
        if not self.is_initialized:
            return 0
        batch, heads, _, head_dim = self.held.storage.window_k.shape
        return batch * heads * self.length * (head_dim + self.format.value_dim) * self.dtype.itemsize

    @abstractmethod
    def attend(self, view: KVView, call: AttentionCall) -> Tensor:
        """Attention of new tokens to a view of this layer, ``[B, Hq, L, Dv]``."""

    @abstractmethod
    def observe(self, view: View, call: AttentionCall | None) -> None:
        """Learn what has attended to the uncommitted tokens; None if it does not tell its queries."""

    @property
    def _indexed_recall(self) -> Recall | None:
        """``recall``, with what choosers know of the pages that are there."""
        return None if self.recall is None else Recall(self.recall, self.held.storage.index)

    def _view(self, keys: Tensor, values: Tensor, new: int) -> KVView:
        """What the newest ``new`` positions attend to."""
        storage = self.held.storage
        return KVView(
            self,
            keys,
            values,
            new,
            storage.used_pages(self.rows),
            self.format,
            key_map=self.held.advice.key_map,
            rows=self.held.layout,
            plain=self.rows.length == 0 and not (self.speculation is not None and self.speculation.tokens),
            units=storage.units if self.rows.length else AS_THEY_ARE,
            severed=storage.severed,
            given=self.held.chosen and self.held.chosen.given,
            recall=self._indexed_recall,
            ragged=self.held.ragged,
            residual=storage.residual,
        )

    def _real_positions(self, uncommitted: Uncommitted) -> Tensor | None:
        """Which of the uncommitted positions hold a token, bool ``[B, new]``; None if all do."""
        if uncommitted.call is not None:
            return uncommitted.real
        padding, total = self.shared.padding, self.rows.length + uncommitted.new
        if padding is None or padding.shape[1] < total:
            return None
        real = padding[:, self.rows.length : total].bool().cpu().expand(self.batch_size, -1)
        return None if real.all() else real


def _without_padding(x: Tensor, real: Tensor) -> Tensor:
    """``x`` ``[B, H, T, D]`` with 0 where the newest positions, ``real`` ``[B, new]``, hold no token."""
    known = torch.ones(len(real), x.shape[2] - real.shape[1], dtype=torch.bool)
    holds = torch.cat([known, real], 1).to(x.device)
    return x.where(holds[:, None, :, None], 0)
