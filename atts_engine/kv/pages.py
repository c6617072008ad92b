"""The page pool: a free list and a reference count per page. Bookkeeping only; tensors live in the lane. A lane has one
pool on its device and may have a second one in host memory, for the pages of preempted sequences."""

from __future__ import annotations

from collections.abc import Iterable

from atts_engine.errors import AttsError, InputError

PAD_PAGE = 0
"""Never handed out and never written: block tables are padded with it, so its contents must stay finite."""


class OutOfPages(AttsError):
    """The pool cannot give as many pages as were asked for; nothing was taken."""


class PagePool:
    """`num_pages` pages of `page_size` tokens, of which one (`PAD_PAGE`) is kept back, or none without `padding`.

    Invariant: `free + used == capacity`. A page is free exactly when its count is 0 and it is not in quarantine:
    a tainted page (one that may hold NaN) is kept back when its last holder lets go, until `readmit` says it was wiped.
    """

    def __init__(self, num_pages: int, page_size: int, *, padding: bool = True) -> None:
        if page_size < 1:
            raise InputError(f"page_size must be 1 or more tokens, not {page_size}")
        first = PAD_PAGE + 1 if padding else 0
        if num_pages < first:
            raise InputError(f"a page pool needs 1 page or more (one is kept for padding), not {num_pages}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.capacity = num_pages - first
        self._free = list(range(num_pages - 1, first - 1, -1))
        self._refs = [0] * num_pages
        self._tainted: set[int] = set()
        self._quarantine: list[int] = []
        self.peak = 0
        """The most pages that were in use at once since the beginning, or since `restart_peak`."""

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def tokens(self) -> int:
        """What all pages hold when they are full."""
        return self.capacity * self.page_size

    @property
    def used(self) -> int:
        return self.capacity - self.free

    def refs(self, page: int) -> int:
        return self._refs[page]

    def allocate(self, n: int) -> list[int]:
        """Take `n` pages with count 1 each; raises `OutOfPages` and takes none when fewer are free."""
        if n > len(self._free):
            raise OutOfPages(f"{n} pages wanted, {len(self._free)} of {self.capacity} free")
        pages = [self._free.pop() for _ in range(n)]
        for page in pages:
            self._refs[page] = 1
        self.peak = max(self.peak, self.used)
        return pages

    def restart_peak(self) -> None:
        self.peak = self.used

    def share(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._refs[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one reference to each page."""
        for page in pages:
            if self._refs[page] <= 0:
                raise AssertionError(f"page {page} released more often than it was taken")
            self._refs[page] -= 1
            if self._refs[page] == 0:
                (self._quarantine if page in self._tainted else self._free).append(page)

    def taint(self, pages: Iterable[int]) -> None:
        self._tainted.update(pages)

    def clean(self, pages: Iterable[int]) -> bool:
        """None of the pages may hold NaN."""
        return self._tainted.isdisjoint(pages)

    @property
    def quarantined(self) -> list[int]:
        """Tainted pages that nobody holds: to be wiped, then readmitted."""
        return list(self._quarantine)

    def readmit(self) -> None:
        self._tainted.difference_update(self._quarantine)
        self._free.extend(self._quarantine)
        self._quarantine.clear()
