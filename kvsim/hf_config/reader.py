"""Typed access to a config's keys: every complaint names the key, the value and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from kvsim.errors import InvalidSpec

MAX_COUNT = 10**9
MAX_LAYERS = 4096


class ConfigReader:
    """Reads a config mapping; ``null`` counts as absent, the first key of several that is present wins.

    Parameters
    ----------
    config
        The language model's part of the config.
    where
        Prefix of every error: the model's name or file.
    parent
        The whole config of a multimodal model, asked where ``config`` lacks a key that applies to both.
    """

    def __init__(self, config: Mapping[str, Any], where: str, parent: Mapping[str, Any] | None = None) -> None:
        self._config = config
        self._parent = parent or {}
        self.where = where

    def fail(self, key: str, problem: str) -> NoReturn:
        """Raise InvalidSpec naming the place and the key."""
        msg = f"{self.where}: {key}: {problem}"
        raise InvalidSpec(msg)

    def has(self, *keys: str) -> bool:
        """Whether any of the keys is present and not null."""
        return any(self._config.get(key) is not None for key in keys)

    def find(self, *keys: str) -> tuple[str, Any]:
        """First key present with its value; the first key and None where all are absent."""
        for key in keys:
            value = self._config.get(key)
            if value is not None:
                return key, value
        return keys[0], None

    def inherited(self, key: str) -> Any:
        """Value of a key of the language model, else of the whole multimodal config."""
        value = self._config.get(key)
        return self._parent.get(key) if value is None else value

    def optional_integer(self, *keys: str, minimum: int = 0, maximum: int = MAX_COUNT) -> int | None:
        """Whole number within bounds, or None where every key is absent."""
        key, value = self.find(*keys)
        if value is None:
            return None
        return self._integer(key, value, minimum, maximum)

    def integer(self, *keys: str, default: int | None = None, minimum: int = 1, maximum: int = MAX_COUNT) -> int:
        """Whole number within bounds; missing without a default is an error."""
        value = self.optional_integer(*keys, minimum=minimum, maximum=maximum)
        if value is not None:
            return value
        if default is None:
            others = f" (or {', '.join(keys[1:])})" if len(keys) > 1 else ""
            self.fail(keys[0], f"required{others}, but missing; kvsim reads decoder-only transformer configs")
        return default

    def flag(self, key: str, *, default: bool) -> bool:
        """Boolean, or ``default`` where absent."""
        value = self._config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(key, f"must be true or false (got {_shown(value)})")
        return value

    def text(self, key: str, default: str) -> str:
        """Return a string, or ``default`` where absent."""
        value = self._config.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self.fail(key, f"must be a string (got {_shown(value)})")
        return value

    def strings(self, key: str) -> tuple[str, ...] | None:
        """List of strings, or None where absent."""
        items = self._items(key)
        if items is None:
            return None
        for item in items:
            if not isinstance(item, str):
                self.fail(key, f"must be a list of strings (got {_shown(item)} in it)")
        return tuple(items)

    def integers(self, key: str, *, maximum: int = MAX_COUNT) -> tuple[int, ...] | None:
        """List of whole numbers from 0, or None where absent."""
        items = self._items(key)
        if items is None:
            return None
        return tuple(self._integer(key, item, 0, maximum) for item in items)

    def mapping(self, key: str) -> Mapping[str, Any] | None:
        """Nested object of this config or its parent, or None where absent."""
        value = self.inherited(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.fail(key, f"must be an object (got {_shown(value)})")
        return value

    def _items(self, key: str) -> Sequence[Any] | None:
        value = self._config.get(key)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)):
            self.fail(key, f"must be a list (got {_shown(value)})")
        return value

    def _integer(self, key: str, value: Any, minimum: int, maximum: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            self.fail(key, f"must be a whole number from {minimum} to {maximum} (got {_shown(value)})")
        return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
