"""Things found by name: each is a file of its own in one package, and no list names them.

A module of that package registers what it defines when it is imported. All of them are imported at
the first look.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Registry(Mapping[str, Item], Generic[Item]):
    """Items by name, sorted. `package` holds their modules."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._items: dict[str, Item] = {}
        self._complete = False

    def add(self, name: str, item: Item) -> None:
        """Registers `item`. Raises ValueError if another one has the name."""
        if self._items.setdefault(name, item) is not item:
            raise ValueError(f"{self._package}: {name!r} is registered twice")

    def _all(self) -> dict[str, Item]:
        if not self._complete:
            self._complete = True
            folder = importlib.import_module(self._package).__path__
            for module in pkgutil.iter_modules(folder):
                importlib.import_module(f"{self._package}.{module.name}")
            self._items = dict(sorted(self._items.items()))
        return self._items

    def __getitem__(self, name: str) -> Item:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())
