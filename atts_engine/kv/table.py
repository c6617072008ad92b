"""The block table of one sequence: its pages in order, with copy-on-write before a shared page is written."""

from __future__ import annotations

from atts_engine.kv.pages import PagePool


class BlockTable:
    """Pages that hold positions 0 .. len(pages) * page_size - 1 of one sequence."""

    def __init__(self, pool: PagePool, pages: list[int] | None = None) -> None:
        self._pool = pool
        self.pages: list[int] = pages if pages is not None else []

    def reserve(self, start: int, end: int) -> list[tuple[int, int]]:
        """Make positions [start, end) writable by this sequence alone.

        Returns the (source, destination) page copies that the caller must carry out before it writes: a shared
        page is replaced here at once, so a copy that is forgotten loses the tokens before `start`.
        Raises `OutOfPages` and changes nothing when the pool is short.
        """
        size = self._pool.page_size
        first = start // size
        shared = [i for i in range(first, min(len(self.pages), -(-end // size))) if self._pool.refs(self.pages[i]) > 1]
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

    def fork(self) -> BlockTable:
        self._pool.share(self.pages)
        return BlockTable(self._pool, list(self.pages))

    def truncate(self, length: int) -> None:
        """Keep the pages of positions [0, length)."""
        keep = -(-length // self._pool.page_size)
        self._pool.release(self.pages[keep:])
        del self.pages[keep:]

    def release(self) -> None:
        self.truncate(0)

    def slots(self, start: int, end: int) -> list[int]:
        """Flat slot (page * page_size + offset) of each position in [start, end)."""
        size, pages = self._pool.page_size, self.pages
        return [pages[p // size] * size + p % size for p in range(start, end)]
