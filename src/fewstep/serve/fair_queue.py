"""A queue that is fair between clients, and between the shapes of one client."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass
class _Client(Generic[Item]):
    """Attributes: the service received so far, and the waiting items and the service of each shape."""

    served: float = 0.0
    waiting: dict[Hashable, deque[Item]] = field(default_factory=dict)
    shape_served: dict[Hashable, float] = field(default_factory=dict)


class FairQueue(Generic[Item]):
    """Start-time fair queueing (Goyal et al., SIGCOMM 1996) at two levels: the client with the least service comes
    first, and of its shapes the one with the least. A newcomer starts at the least service of those that wait, so that
    idleness earns no credit.

    Items of one shape can be computed together, see :meth:`take`.
    """

    def __init__(self) -> None:
        self._clients: dict[str, _Client[Item]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, item: Item, client: str, shape: Hashable) -> None:
        own = self._clients.setdefault(client, _Client())
        if not own.waiting:
            own.served = max(own.served, min((c.served for c in self._clients.values() if c.waiting), default=0.0))
        if shape not in own.waiting:
            own.waiting[shape] = deque()
            own.shape_served[shape] = min(own.shape_served.values(), default=0.0)
        own.waiting[shape].append(item)
        self._count += 1

    def take(self, limit: Callable[[Item], int], cost: Callable[[Item], float]) -> list[Item]:
        """Remove and return the first item and those of its shape, also of other clients, in the order of fairness.

        Args:
            limit: the number of items of this one's shape that are taken together.
            cost: the service that an item receives.
        """
        taken: list[Item] = []
        shape: Hashable = None
        while True:
            waiting = [c for c in self._clients.values() if (shape in c.waiting if taken else c.waiting)]
            if not waiting or (taken and len(taken) >= limit(taken[0])):
                return taken
            client = min(waiting, key=lambda one: one.served)
            if not taken:
                shape = min(client.waiting, key=lambda one: client.shape_served[one])
            item = client.waiting[shape].popleft()
            client.served += cost(item)
            client.shape_served[shape] += cost(item)
            self._count -= 1
            self._drop_if_empty(client, shape)
            taken.append(item)

    def remove(self, unwanted: Callable[[Item], bool]) -> None:
        """Remove items that nobody waits for any more."""
        for client in self._clients.values():
            for shape in list(client.waiting):
                kept = deque(item for item in client.waiting[shape] if not unwanted(item))
                self._count -= len(client.waiting[shape]) - len(kept)
                client.waiting[shape] = kept
                self._drop_if_empty(client, shape)

    def items(self) -> list[Item]:
        """All that wait, in no particular order."""
        return [item for client in self._clients.values() for queue in client.waiting.values() for item in queue]

    @staticmethod
    def _drop_if_empty(client: _Client[Item], shape: Hashable) -> None:
        if not client.waiting[shape]:
            del client.waiting[shape], client.shape_served[shape]
