"""What is known by name: methods, scorers of heads, rankers. Each kind has one registry."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Generic, TypeVar

from sparing.errors import UnknownNameError

Info = TypeVar("Info")


class Registry(Generic[Info]):
    """Things of one kind, made known by the modules of the `methods` package.

    Args:
        kind: what messages call one of them.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._known: dict[str, Info] = {}

    def add(self, name: str, info: Info) -> Info:
        """Make one known."""
        assert name not in self._known, f"two {self.kind}s named {name}"
        self._known[name] = info
        return info

    def all(self) -> dict[str, Info]:
        """All of them by name, in the order of their names."""
        _import_methods()
        return dict(sorted(self._known.items()))

    def find(self, name: str) -> Info:
        """The one of that name.

        Raises:
            UnknownNameError: there is none.
        """
        known = self.all()
        if name not in known:
            raise UnknownNameError(self.kind, name, known)
        return known[name]


@cache
def _import_methods() -> None:
    import sparing.methods

    for module in pkgutil.walk_packages(sparing.methods.__path__, "sparing.methods."):
        importlib.import_module(module.name)
