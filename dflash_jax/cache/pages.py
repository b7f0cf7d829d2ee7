"""Which pages of the pools are free, and how many sequences read each of the others."""

from __future__ import annotations

from collections.abc import Iterable


class OutOfPagesError(RuntimeError):
    """No page is free."""


class PageAllocator:
    """Hands out page numbers 1..num_pages-1; page 0 takes the writes that nobody reads and is never handed out."""

    def __init__(self, num_pages: int) -> None:
        self.total = num_pages - 1
        self._free = list(range(num_pages - 1, 0, -1))
        self._readers: dict[int, int] = {}

    @property
    def free(self) -> int:
        """How many pages are free."""
        return len(self._free)

    @property
    def used(self) -> int:
        """How many pages are held by at least one sequence."""
        return self.total - self.free

    def take(self) -> int:
        """A free page with one reader. Raises OutOfPagesError."""
        if not self._free:
            raise OutOfPagesError(f"all {self.total} pages are in use")
        page = self._free.pop()
        self._readers[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """Adds a reader to each page."""
        for page in pages:
            self._readers[page] += 1

    def is_shared(self, page: int) -> bool:
        """Whether more than one sequence reads the page, so that none may write to it."""
        return self._readers[page] > 1

    def release(self, pages: Iterable[int]) -> None:
        """Takes a reader from each page; a page without readers is free again."""
        for page in pages:
            self._readers[page] -= 1
            if self._readers[page] == 0:
                del self._readers[page]
                self._free.append(page)
