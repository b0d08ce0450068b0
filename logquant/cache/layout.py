"""Where the tokens of each row of a batch are: packed, exact, and by which position."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention.masks import seen_by_some
from .slots import NOTHING_BY_HEAD, Memo, Slots


class Move(NamedTuple):
    """What becomes of the exact and new tokens of some rows of a batch; numbers are slots of [exact tokens | new].

    Attributes:
        rows: the rows.
        packed: packed tokens before.
        tokens: exact and new tokens.
        leaving: those that leave the window, in order, ``[1 or rows, n]``.
        staying: those that are exact afterwards, in order, ``[1 or rows, k]``; None if they are where they belong
            already.
        is_step: whether this is one eviction of the rule from a window without gaps.
        packs: how many of those that leave become packed; fewer where a prompt is pruned.
        by_head: whether each KV head chooses which, or in which order.
        kept: of each KV head those that become packed, in order, ``[rows, H, packs]``; None: all as they leave, or
            not chosen yet.
    """

    rows: slice
    packed: int
    tokens: int
    leaving: Tensor
    staying: Tensor | None
    is_step: bool
    packs: int
    by_head: bool = False
    kept: Tensor | None = None

    @property
    def packing(self) -> Tensor:
        """Those that become packed, in order, ``[1 or rows, packs]`` or ``[rows, H, packs]``."""
        return self.leaving if self.kept is None else self.kept


class _SameTensor:
    """Compares equal to another one of the same tensor, unchanged, and does not keep it alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._version = 0 if tensor.is_inference() else tensor._version

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _SameTensor) or self._version != other._version:
            return False
        tensor = self._tensor()
        return tensor is not None and tensor is other._tensor()

    __hash__ = None  # type: ignore[assignment]


class Rows(Memo):
    """The slots of every row of a batch, each by the number of its own tokens, and the positions they came at.

    A *position* is a place in the padded sequences that the model is fed with; in a row with padding some hold no
    token, and the cache keeps nothing of them. Without padding one :class:`Slots` stands for all rows.

    Immutable, so the layers of a cache share one, and each next one is worked out once: the first layer of a step calls
    :meth:`append`, the others get the same object.

    Args:
        slots: of each row, or one for all.
        length: positions seen.
        real: of each row the positions that hold its tokens, int32; None if these are all positions of all rows.
        reserved: how many of the newest tokens the rule leaves alone, since a :meth:`crop` may remove them; more than
            0 only in speculative decoding.
    """

    def __init__(
        self, slots: tuple[Slots, ...], length: int = 0, real: tuple[Tensor, ...] | None = None, reserved: int = 0
    ) -> None:
        super().__init__()
        if real is not None and all(s.tokens == length for s in slots):
            slots, real = slots[:1], None
        self.slots, self.length, self.real, self.reserved = slots, length, real, reserved
        self.packed_counts = tuple([s.packed for s in slots])
        self.packed = max(self.packed_counts)
        self.exact = max([s.exact for s in slots])

    def __deepcopy__(self, memo: object) -> Rows:
        return self

    def equals(self, other: Rows) -> bool:
        """Whether both are without padding, and say the same of tokens under the same rule."""
        return (
            self.real is other.real is None
            and (self.length, self.reserved) == (other.length, other.reserved)
            and self.slots[0].state() == other.slots[0].state()
        )

    @property
    def alike(self) -> bool:
        """Whether no row has padding."""
        return self.real is None

    @property
    def complete(self) -> bool:
        """Whether all tokens that have come are still there, in the same places of all KV heads."""
        return all(s.by_head == NOTHING_BY_HEAD for s in self.slots)

    @property
    def undecided(self) -> bool:
        """Whether there are tokens that the rule has not been applied to."""
        return any(s.decided < s.tokens for s in self.slots)

    def reserving(self, tokens: int) -> Rows:
        """The same rows, of whose newest tokens the rule leaves that many alone from now on."""
        if tokens == self.reserved:
            return self
        return self.once("reserving", tokens, lambda: Rows(self.slots, self.length, self.real, tokens))

    def each(self, batch: int) -> tuple[Slots, ...]:
        """The slots of each of ``batch`` rows, though they be alike."""
        return self.slots * (batch // len(self.slots))

    def append(self, new: int, real: Tensor | None = None) -> Rows:
        """The rows after ``new`` more positions and the evictions then due.

        Args:
            new: positions that arrive.
            real: bool ``[batch, new]`` on the CPU, which of them hold a token; None if all do.
        """
        key = new, None if real is None else real.numpy().tobytes()
        return self.once_while_used("append", key, lambda: self._append(new, real))

    def _append(self, new: int, real: Tensor | None) -> Rows:
        total = self.length + new
        if real is None and self.real is None:
            return Rows((self.slots[0].append(new, self.reserved),), total, None, self.reserved)
        batch = len(self.slots) if real is None else len(real)
        holds = torch.ones(batch, new, dtype=torch.bool) if real is None else real
        came = [self.length + row.nonzero().squeeze(1).int() for row in holds]
        held = self.real or (torch.arange(self.length, dtype=torch.int32),) * batch
        return Rows(
            tuple(s.append(len(c), self.reserved) for s, c in zip(self.each(batch), came, strict=True)),
            total,
            tuple(torch.cat(both) for both in zip(held, came, strict=True)),
            self.reserved,
        )

    def moves(self, new: int, device: torch.device, real: Tensor | None = None) -> list[Move]:
        """How tokens move when :meth:`append` is called with the same arguments; index vectors are on ``device``."""
        key = new, device, None if real is None else real.numpy().tobytes()
        return self.once("moves", key, lambda: self._moves(new, device, real))

    def _moves(self, new: int, device: torch.device, real: Tensor | None) -> list[Move]:
        slots = self.each(len(self.slots) if real is None else len(real))
        together = self.alike and real is None
        made = []
        for row, held in enumerate(slots):
            came = torch.arange(new, dtype=torch.int32) if real is None else real[row].nonzero().squeeze(1).int()
            source = torch.cat([torch.arange(held.exact, dtype=torch.int32), held.exact + came])
            leaving, staying = (source[ranks.long()] for ranks in held.moves(len(came), self.reserved))
            after = held.append(len(came), self.reserved)
            in_place = torch.equal(staying, torch.arange(len(staying), dtype=torch.int32))
            made.append(
                Move(
                    slice(None) if together else slice(row, row + 1),
                    held.packed,
                    len(source),
                    leaving.to(device)[None],
                    None if in_place else staying.to(device)[None],
                    len(leaving) == held.window and torch.equal(source, torch.arange(len(source), dtype=torch.int32)),
                    after.packed - held.packed,
                    by_head=after.by_head != held.by_head,
                )
            )
        return made

    def exact_before(self, after: Rows) -> list[Tensor]:
        """:meth:`Slots.exact_before` of each row, or of all."""
        return [s.exact_before(left) for s, left in zip(self.slots, after.each(len(self.slots)), strict=True)]

    def crop(self, positions: int) -> Rows:
        """The rows after the newest ``positions`` positions are removed, with none reserved."""
        return self.once("crop", positions, lambda: self._crop(max(0, self.length - positions)))

    def _crop(self, total: int) -> Rows:
        if self.real is None:
            return Rows((self.slots[0].crop(self.length - total),), total)
        left = [int((at < total).sum()) for at in self.real]
        return Rows(
            tuple(s.crop(s.tokens - n) for s, n in zip(self.slots, left, strict=True)),
            total,
            tuple(at[:n] for at, n in zip(self.real, left, strict=True)),
        )

    def select(self, rows: list[int]) -> Rows:
        """The rows of a batch made of these, in this order."""
        if self.real is None:
            return self
        real, pick = self.real, tuple(rows)
        return self.once(
            "select",
            pick,
            lambda: Rows(tuple(self.slots[i] for i in pick), self.length, tuple(real[i] for i in pick), self.reserved),
        )

    def positions(self, device: torch.device, new: int = 0) -> Tensor:
        """The position of each slot's token, int32 ``[1 or batch, packed + exact + new]``, on ``device``.

        Slots of rows shorter than the longest are -1: they are empty.

        Args:
            device: where the result goes.
            new: positions that come after those seen; a row's lie right after its exact tokens.
        """

        def make() -> Tensor:
            later = torch.arange(self.length, self.length + new, dtype=torch.int32)
            if self.real is None:
                return torch.cat([self.slots[0].positions(), later])[None].to(device)
            table = torch.full((len(self.slots), self.packed + self.exact + new), -1, dtype=torch.int32)
            for row, slots, real in zip(table, self.slots, self.real, strict=True):
                at = real[slots.positions().long()]
                row[: slots.packed] = at[: slots.packed]
                row[self.packed : self.packed + slots.exact] = at[slots.packed :]
                row[self.packed + slots.exact : self.packed + slots.exact + new] = later
            return table.to(device)

        return self.once("positions", (device, new), make)

    def exact_counts(self, device: torch.device) -> Tensor:
        """Exact tokens of each row, int64 ``[1 or batch]``, on ``device``."""
        return self.once("exact", device, lambda: torch.tensor([s.exact for s in self.slots]).to(device))

    def lengths(self, device: torch.device, page_tokens: int, window_tokens: int) -> Tensor | None:
        """Pages and window slots that each row uses, int32 ``[batch, 2]``; None where all use the same pages."""
        if self.real is None:
            return None
        used = [[s.packed // page_tokens, window_tokens] for s in self.slots]
        return self.once(
            "lengths",
            (device, page_tokens, window_tokens),
            lambda: torch.tensor(used, dtype=torch.int32).to(device),
        )

    def all_seen(self, mask: Tensor) -> Tensor:
        """Whether a query sees all tokens that its row holds, each as it is, bool ``[1 or batch, 1 or queries]``.

        Args:
            mask: as for :meth:`real_positions`, which has not refused it; on any device, the result is on the CPU.
        """

        def make() -> Tensor:
            seen = mask[..., : self.length]
            seen = seen if mask.dtype == torch.bool else seen == 0
            tokens = torch.tensor([s.tokens for s in self.slots], device=mask.device)
            return (seen.sum(-1) == tokens[:, None, None]).all(1).cpu()

        return self.once("all seen", _SameTensor(mask), make)

    def real_positions(self, mask: Tensor | None, new: int, batch: int) -> Tensor | None:
        """Which of ``new`` positions hold a token: those that some query of theirs sees.

        Args:
            mask: boolean (True: seen) or additive, ``[1 or batch, heads, queries, positions]``; None if every query
                sees all (that came before it).
            new: the newest positions.
            batch: rows.

        Returns:
            bool ``[batch, new]`` on the CPU, or None if all do.

        Raises:
            ValueError: a mask of too few positions, or one that shows a position that was hidden when it came.
        """
        if mask is None and self.real is None:
            return None
        # The mask of a step is one object for all layers; looking into it may have to wait for the device.
        key = new, None if mask is None else _SameTensor(mask)
        return self.once("real", key, lambda: self._real_positions(mask, new, batch))

    def _real_positions(self, mask: Tensor | None, new: int, batch: int) -> Tensor | None:
        total = self.length + new
        if mask is None:
            seen = torch.ones(batch, total, dtype=torch.bool)
        else:
            first = self.length if self.real is None else 0
            some = seen_by_some(mask, first, total, batch)
            seen = torch.cat([torch.ones(batch, first, dtype=torch.bool), some], 1)
        for row, held in enumerate(self.real or ()):
            dropped = torch.ones(self.length, dtype=torch.bool).index_fill_(0, held.long(), False)
            if (shown := dropped & seen[row, : self.length]).any():
                raise ValueError(
                    f"attention_mask must hide position {int(shown.nonzero()[0])} of row {row}: it was hidden "
                    "(padding) when it came, and the LogQuant cache has not kept it; got "
                    + ("no mask" if mask is None else "a mask that shows it")
                )
        came = seen[:, self.length :]
        return None if came.all() else came

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors kept here; those on the CPU count as well."""
        own = [entry[1] for entry in self._memo.values() if isinstance(entry[1], Tensor)]
        slots = {id(s): s.nbytes for s in self.slots}
        return sum(t.nbytes for t in (*own, *(self.real or ()))) + sum(slots.values())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file needs to hold these rows again: tensors by name, and what JSON can hold."""
        described = {"columns": self.length, "slots": [s.state() for s in self.slots]}
        if self.real is None:
            return {}, described
        holds = torch.zeros(len(self.slots), self.length, dtype=torch.uint8)
        for row, at in zip(holds, self.real, strict=True):
            row[at.long()] = 1
        return {"real": holds}, described

    @staticmethod
    def restored(empty: Slots, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> Rows:
        """What :meth:`state` gave, under the rule of ``empty``."""
        slots = tuple(empty.restored(*counts) for counts in described["slots"])
        real = None
        if "real" in tensors:
            real = tuple(row.nonzero().squeeze(1).int() for row in tensors["real"])
        return Rows(slots, described["columns"], real)
