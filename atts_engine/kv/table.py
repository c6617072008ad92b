"""The block table of one sequence: its pages in order, with copy-on-write before a shared page is written."""

from __future__ import annotations

from bisect import bisect_left

from atts_engine.kv.pages import PagePool


class BlockTable:
    """Where positions 0, 1, ... of one sequence have their KV: `pages` on the device, then `parked` in host memory.

    Pages that somebody else holds too come first: a fork shares every page of its parent, and whoever writes into a
    shared page replaces it and all that follow. Parked pages may be shared as well, and are only read.
    """

    def __init__(
        self,
        pool: PagePool,
        host: PagePool,
        pages: list[int] | None = None,
        parked: list[int] | None = None,
    ) -> None:
        self._pool = pool
        self._host = host
        self.pages: list[int] = pages if pages is not None else []
        self.parked: list[int] = parked if parked is not None else []

    @property
    def page_size(self) -> int:
        return self._pool.page_size

    @property
    def shared(self) -> int:
        """How many of `pages` have another holder; these are the first ones."""
        return bisect_left(self.pages, True, key=lambda page: self._pool.refs(page) == 1)

    @property
    def private(self) -> list[int]:
        """The pages that come free when this sequence lets go of them."""
        return self.pages[self.shared :]

    def needed(self, start: int, end: int) -> int:
        """Pages that `recall` and then `reserve(start, end)` take from the pool."""
        pages = -(-end // self._pool.page_size)
        return len(self._replaced(start, pages)) + max(len(self.parked), pages - len(self.pages))

    def reserve(self, start: int, end: int) -> list[tuple[int, int]]:
        """Make positions [start, end) writable by this sequence alone; nothing may be parked.

        Returns the (source, destination) page copies that the caller must carry out before it writes: a shared
        page is replaced here at once, so a copy that is forgotten loses the tokens before `start`.
        Raises `OutOfPages` and changes nothing when the pool is short.
        """
        assert not self.parked, "parked pages must be recalled before anything is written behind them"
        size = self._pool.page_size
        shared = self._replaced(start, -(-end // size))
        fresh = max(0, -(-end // size) - len(self.pages))
        taken = self._pool.allocate(len(shared) + fresh)
        copies = []
        for index in shared:
            source, destination = self.pages[index], taken.pop()
            # A page whose first token is rewritten holds nothing worth copying.
            if index * size < start:
                copies.append((source, destination))
            self.pages[index] = destination
            self._pool.release([source])
        self.pages.extend(reversed(taken))
        return copies

    def _replaced(self, start: int, pages: int) -> list[int]:
        """Which of the first `pages` pages somebody else holds too, from the one of position `start` on."""
        first = start // self._pool.page_size
        return [i for i in range(first, min(len(self.pages), pages)) if self._pool.refs(self.pages[i]) > 1]

    def park(self) -> list[tuple[int, int]]:
        """Give up the private pages for slots in the host pool; returns the (page, slot) copies to be made.

        Shared pages stay: moving them would free nothing. Raises `OutOfPages` and changes nothing when the host pool
        is short. The pages may be handed out again at once, so the copies come before anything else that is written.
        """
        pages = self.private
        slots = self._host.allocate(len(pages))
        del self.pages[len(self.pages) - len(pages) :]
        self._pool.release(pages)
        self.parked = slots + self.parked
        return list(zip(pages, slots, strict=True))

    def recall(self) -> list[tuple[int, int]]:
        """Take pages for everything parked; returns the (slot, page) copies to be made.

        The slots stay taken: the caller releases them once no copy into them can come before these.
        """
        slots, self.parked = self.parked, []
        pages = self._pool.allocate(len(slots))
        self.pages.extend(pages)
        return list(zip(slots, pages, strict=True))

    def fork(self) -> BlockTable:
        self._pool.share(self.pages)
        self._host.share(self.parked)
        return BlockTable(self._pool, self._host, list(self.pages), list(self.parked))

    def truncate(self, length: int) -> None:
        """Keep the pages of positions [0, length)."""
        keep = -(-length // self._pool.page_size)
        parked = max(0, keep - len(self.pages))
        self._host.release(self.parked[parked:])
        del self.parked[parked:]
        self._pool.release(self.pages[keep:])
        del self.pages[keep:]

    def release(self) -> None:
        self.truncate(0)
