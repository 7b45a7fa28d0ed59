"""Reading YAML and JSON safely, and writing files so that nothing is ever half-written."""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from kvsim.errors import InvalidSpec, UnknownName
from kvsim.field_paths import Location, key_hint, locate
from kvsim.units import MEBI

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_DOCUMENT_BYTES = 4 * MEBI
MAX_ALIASES = 50
MAX_SHOWN_ERRORS = 8
MAX_SHOWN_CHARACTERS = 80
ModelT = TypeVar("ModelT", bound=BaseModel)


class _SafeLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and alias bombs."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            self._aliases += 1
            if self._aliases > MAX_ALIASES:
                raise yaml.constructor.ConstructorError(None, None, f"more than {MAX_ALIASES} aliases")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool)):
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _read_text(path: Path) -> str:
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_DOCUMENT_BYTES:
            msg = f"{path}: {size_bytes} bytes is larger than the {MAX_DOCUMENT_BYTES} allowed for a document"
            raise InvalidSpec(msg)
        return path.read_text(encoding="utf-8")
    except OSError as error:
        msg = f"{path}: cannot read: {error.strerror}"
        raise InvalidSpec(msg) from error
    except UnicodeDecodeError as error:
        msg = f"{path}: not UTF-8 text (byte {error.start})"
        raise InvalidSpec(msg) from error


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text; raise InvalidSpec naming ``where`` and the line."""
    loader = _SafeLoader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        msg = f"{where}{line}: not valid YAML: {problem}"
        raise InvalidSpec(msg) from error
    finally:
        loader.dispose()


def load_yaml(path: Path) -> Any:
    """Read one YAML document from ``path``."""
    return parse_yaml(_read_text(path), str(path))


def load_json(path: Path) -> Any:
    """Read one JSON document; Infinity and NaN (seen in some Hugging Face configs) become None."""
    try:
        return json.loads(_read_text(path), parse_constant=lambda _: None)
    except (json.JSONDecodeError, RecursionError) as error:
        detail = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        msg = f"{path}: not valid JSON: {detail}"
        raise InvalidSpec(msg) from error


def validate(model: type[ModelT], data: Any, where: str, *, require_units: bool = False) -> ModelT:
    """Validate ``data`` as ``model``; raise InvalidSpec naming file, field, value and what is allowed."""
    try:
        return model.model_validate(data, context={"require_units": require_units})
    except ValidationError as error:
        raise InvalidSpec(describe_validation_error(error, model, where, data)) from None
    except UnknownName as error:
        msg = f"{where}: {error}"
        raise InvalidSpec(msg) from error


def describe_validation_error(error: ValidationError, model: type[BaseModel], where: str, data: Any = None) -> str:
    """One line per problem: where: field: what is wrong; what is allowed. The noise of unions is left out.

    Fields are named as ``data`` has them, where it uses another name of one.
    """
    located = [(locate(model, problem["loc"]), problem) for problem in error.errors(include_url=False)]
    lines: list[str] = []
    for location, problem in located:
        if _is_union_noise(location.keys, problem, [(other.keys, p["type"]) for other, p in located]):
            continue
        line = f"{where}: {_describe_problem(_as_written(location, data), problem, model)}"
        if line not in lines:
            lines.append(line)
    hidden = len(lines) - MAX_SHOWN_ERRORS
    return "\n".join(lines[:MAX_SHOWN_ERRORS] + ([f"{where}: and {hidden} more problems"] if hidden > 0 else []))


def _as_written(location: Location, data: Any) -> Location:
    """The location with its last key as the document spells it: an engine's own name of an option stays that."""
    parent = data
    for key in location.keys[:-1]:
        parent = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(parent, dict) or not location.keys or location.keys[-1] in parent:
        return location
    names = {own: shared for owner in location.owners for own, shared in getattr(owner, "other_names", {}).items()}
    own = next((name for name in parent if names.get(name) == location.keys[-1]), location.keys[-1])
    return replace(location, keys=(*location.keys[:-1], own))


def _is_union_noise(keys: tuple[str, ...], problem: ErrorDetails, others: list[tuple[tuple[str, ...], str]]) -> bool:
    """Whether a type complaint only says that another member of the same union was meant."""
    if problem["type"] == "string_type" and isinstance(problem["input"], dict):
        return any(other[: len(keys)] == keys and kind != "string_type" for other, kind in others)
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return (keys, "string_type") in others
    if problem["type"] == "tuple_type":
        return any(other == keys and kind != "tuple_type" for other, kind in others)
    if problem["type"] == "too_short":
        # Items that are wrong themselves are counted as missing.
        return any(other[: len(keys)] == keys and len(other) > len(keys) for other, _ in others)
    return False


def _describe_problem(location: Location, problem: ErrorDetails, model: type[BaseModel]) -> str:
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    field = ".".join(location.keys) or "(top level)"
    match kind:
        case "extra_forbidden":
            message = f"unknown key; {key_hint(model, location.owners, str(problem['loc'][-1]), location.keys)}"
        case "missing":
            message = "required, but missing"
        case "union_tag_invalid":
            field = f"{field}.{context['discriminator'].strip(chr(39))}"
            message = _not_allowed(context["tag"], context["expected_tags"])
        case "union_tag_not_found":
            message = f"needs the key {context['discriminator']}, which says what sort it is (got {_shown(value)})"
        case "literal_error" | "enum":
            message = _not_allowed(value, context["expected"])
        case "tuple_type":
            message = f"must be a list (got {_shown(value)})"
        case "too_short" | "too_long":
            bound, least = ("at least", "min_length") if kind == "too_short" else ("at most", "max_length")
            message = f"must have {bound} {context[least]} items, and has {len(value)}"
        case "model_type" | "model_attributes_type" | "dict_type":
            message = f"must be a mapping of keys and values (got {_shown(value)})"
        case _ if not location.keys:
            # A rule about several keys at once names what it means, and all of it is too much to show.
            return problem["msg"].removeprefix("Value error, ")
        case _:
            message = f"{problem['msg'].removeprefix('Value error, ')} (got {_shown(value)})"
    return f"{field}: {message}"


def _not_allowed(value: Any, expected: str) -> str:
    """Say which values a choice allows, with the nearest one where the value looks like a slip."""
    allowed = [word.strip().strip("'") for word in expected.replace(" or ", ", ").split(",")]
    near = difflib.get_close_matches(str(value).lower(), allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{_shown(value)} is not allowed; allowed: {', '.join(allowed)}{hint}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 3] + "..."


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` so that readers see the old file or the whole new one: temp file, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_output_path(path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse before the work what could not be written after it: a folder, an unknown suffix, a file as parent."""
    if path.suffix not in suffixes:
        msg = f"{path}: the name must end in {' or '.join(suffixes)}"
        raise InvalidSpec(msg)
    if path.is_dir():
        msg = f"{path}: is a folder; name a file in it"
        raise InvalidSpec(msg)
    blocking = next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None)
    if blocking is not None:
        msg = f"{path}: {blocking} is a file, not a folder"
        raise InvalidSpec(msg)


def write_output(path: Path, data: bytes) -> None:
    """Write a file atomically, replacing an old one; raise InvalidSpec where the system refuses."""
    try:
        write_atomic(path, data)
    except OSError as error:
        msg = f"{path}: cannot write: {error.strerror}"
        raise InvalidSpec(msg) from error
