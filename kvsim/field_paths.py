"""Dotted keys into nested specs: which keys exist, and what a pydantic error location means to a reader."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from kvsim.errors import InvalidSpec

MAX_DEPTH = 8


@dataclass(frozen=True, slots=True)
class Location:
    """Where an error sits: the keys a person wrote, and the models that could own the last of them."""

    keys: tuple[str, ...]
    owners: tuple[type[BaseModel], ...]


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """Members of an annotated or nested union, without None; one member where it is no union."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return alternatives(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return tuple(member for part in get_args(annotation) for member in alternatives(part))
    return () if annotation is NoneType else (annotation,)


def models_of(candidates: Iterable[Any]) -> tuple[type[BaseModel], ...]:
    """Only the candidates that are specs."""
    return tuple(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))


def field_alternatives(candidates: Iterable[Any], key: str) -> tuple[Any, ...] | None:
    """List what ``key`` may hold in any of the candidate specs; None where none of them has it."""
    named = [(model, _other_name(model, key)) for model in models_of(candidates)]
    owners = [(model, name) for model, name in named if name in model.model_fields]
    if not owners:
        return None
    return tuple(member for model, name in owners for member in alternatives(model.model_fields[name].annotation))


def _other_name(model: type[BaseModel], key: str) -> str:
    """The field that ``key`` is another name of (a spec's ``other_names``), or ``key``."""
    names: Mapping[str, str] = getattr(model, "other_names", {})
    return names.get(key, key)


def tags_of(model: type[BaseModel]) -> tuple[str, ...]:
    """Values of a spec's ``kind``, which tell the members of a union apart."""
    kind = model.model_fields.get("kind")
    return tuple(map(str, get_args(kind.annotation))) if kind and get_origin(kind.annotation) is Literal else ()


def _narrowed(candidates: tuple[Any, ...], tag: object) -> tuple[Any, ...] | None:
    """Members of a union that pydantic's location part ``tag`` stands for, or None where it is no tag."""
    models = models_of(candidates)
    if isinstance(tag, str) and tag.startswith("tagged-union["):
        return models
    matches = tuple(c for c in candidates if getattr(c, "__name__", None) == tag)
    matches += tuple(model for model in models if tag in tags_of(model) and model not in matches)
    return matches or None


def locate(model: type[BaseModel], location: tuple[int | str, ...]) -> Location:
    """Drop pydantic's union tags from an error location, so that only keys a person wrote remain."""
    candidates: tuple[Any, ...] = (model,)
    keys: list[str] = []
    owners: tuple[type[BaseModel], ...] = (model,)
    for part in location:
        if len(candidates) > 1:
            narrowed = _narrowed(candidates, part)
            if narrowed is not None:
                candidates = narrowed
                continue
        containers = [c for c in candidates if get_origin(c) is dict] if isinstance(part, str) else list(candidates)
        if isinstance(part, int) or containers:
            keys.append(str(part))
            candidates = tuple(
                member for c in containers for item in get_args(c) if item is not ... for member in alternatives(item)
            )
            continue
        found = field_alternatives(candidates, part)
        if found is None and not models_of(candidates):
            continue
        owners = models_of(candidates)
        keys.append(part)
        candidates = found or ()
    return Location(tuple(keys), owners)


def dotted_keys(model: type[BaseModel], prefix: str = "", depth: int = 0) -> Iterator[str]:
    """Every dotted key below ``model``, nested specs and all members of unions included."""
    for name, info in model.model_fields.items():
        key = f"{prefix}{name}"
        yield key
        if depth < MAX_DEPTH:
            for nested in models_of(alternatives(info.annotation)):
                yield from dotted_keys(nested, f"{key}.", depth + 1)


def key_hint(model: type[BaseModel], owners: Iterable[type[BaseModel]], key: str, written: tuple[str, ...] = ()) -> str:
    """Suggest the nearest key at the same level, else the same key elsewhere, else list what is allowed.

    Elsewhere is not ``written``, where the key stands, though another kind may have it there. From within a list
    nothing is sent elsewhere: its items are of several kinds too.
    """
    known = sorted({name for owner in owners for name in owner.model_fields})
    near = difflib.get_close_matches(key, known, n=2, cutoff=0.6)
    is_item = any(part.isdigit() for part in written)
    if not near and not is_item:
        same = {dotted for dotted in dotted_keys(model) if dotted.rpartition(".")[2] == key} - {".".join(written)}
        shallowest = min((dotted.count(".") for dotted in same), default=0)
        near = sorted(dotted for dotted in same if dotted.count(".") == shallowest)[:2]
    if not near and not is_item:
        near = difflib.get_close_matches(key, known, n=2, cutoff=0.45)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"allowed: {', '.join(known)}" if known else "nothing may be set below it"


def check_dotted_key(model: type[BaseModel], key: str, where: str) -> None:
    """Raise InvalidSpec unless ``key`` (such as ``engine.max_num_seqs``) names a field below ``model``."""
    candidates: tuple[Any, ...] = (model,)
    walked: list[str] = []
    for part in key.split("."):
        found = field_alternatives(candidates, part)
        if found is None:
            parent = f" under {'.'.join(walked)!r}" if walked else ""
            hint = _list_hint(candidates, walked) or key_hint(model, models_of(candidates), part)
            msg = f"{where}: {key}: unknown key {part!r}{parent}; {hint}"
            raise InvalidSpec(msg)
        walked.append(part)
        candidates = found


def _list_hint(candidates: tuple[Any, ...], walked: list[str]) -> str | None:
    """What to do instead of naming an item of a list; None where the candidates are no list."""
    if not any(get_origin(candidate) is tuple for candidate in candidates):
        return None
    return f"a list is set as a whole, such as {'.'.join(walked)}=[...]"
