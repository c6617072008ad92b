"""Who is served next among groups of sequences (the chains of a problem are one group)."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator

from atts_engine.runtime.sequence import Sequence


class ServiceCounters:
    """Forwarded tokens of each group; the group with the fewest comes first. A group that had nothing to do is lifted
    to the least of those that had: what it did not use it cannot claim later. (The virtual token counter of Sheng et
    al., Fairness in Serving Large Language Models, OSDI 2024, counting forwarded tokens.)"""

    def __init__(self) -> None:
        self._served: dict[Hashable, int] = {}
        self._active: set[Hashable] = set()

    def begin(self, known: set[Hashable], active: set[Hashable]) -> None:
        """A step begins: `known` groups have sequences, `active` ones have sequences that want work."""
        floor = min((self._served[g] for g in (self._active & active) or self._active), default=0)
        for group in active - self._active:
            self._served[group] = max(self._served.get(group, 0), floor)
        if active:
            # Groups that are gone stay for one step as the floor of those that come after them.
            self._served = {g: n for g, n in self._served.items() if g in known or g in active}
            self._active = active

    def charge(self, group: Hashable, tokens: int) -> None:
        self._served[group] += tokens

    def served(self, group: Hashable) -> int:
        return self._served[group]

    def order(self, sequences: Iterable[Sequence], key: Callable[[Sequence], tuple[int, ...]]) -> Iterator[Sequence]:
        """The sequences, each of the group that was served least when it is asked for, in order of `key` within it."""
        queues: defaultdict[Hashable, deque[Sequence]] = defaultdict(deque)
        for seq in sorted(sequences, key=key):
            queues[seq.group].append(seq)
        heap = [(self._served[g], key(q[0]), q[0].id, q) for g, q in queues.items()]
        heapq.heapify(heap)
        while heap:
            queue = heapq.heappop(heap)[-1]
            seq = queue.popleft()
            yield seq
            if queue:
                heapq.heappush(heap, (self._served[seq.group], key(queue[0]), queue[0].id, queue))
