"""Files that say what they hold: a document with the hash of its content, so that an edit is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from kvsim.documents import load_json, validate, write_atomic
from kvsim.errors import CalibrationError
from kvsim.specs.base import Spec

SCHEMA_VERSION: Final = 1


class SealedSpec(Spec):
    """A value that is stored with its hash."""

    schema_version: Literal[1] = 1

    @property
    def content_sha256(self) -> str:
        """Hash of everything in it."""
        return hashlib.sha256(self._canonical().encode()).hexdigest()

    @property
    def id(self) -> str:
        """Short name in sets and reports."""
        return self.content_sha256[:12]

    def _stated(self) -> dict[str, Any]:
        """Give what is hashed and stored."""
        return self.model_dump(mode="json")

    def _canonical(self) -> str:
        return json.dumps(self._stated(), sort_keys=True, separators=(",", ":"))

    def write_sealed(self, path: Path) -> None:
        """Write it with its hash."""
        document = {"content_sha256": self.content_sha256, **json.loads(self._canonical())}
        write_atomic(path, (json.dumps(document, indent=1) + "\n").encode())


def refuse_newer(document: Mapping[str, Any], path: Path) -> None:
    """Raise CalibrationError for a document of a later schema, before its fields are looked at."""
    version = document.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        msg = f"{path}: schema_version {version} is newer than this kvsim reads ({SCHEMA_VERSION}); update kvsim"
        raise CalibrationError(msg)


SealedT = TypeVar("SealedT", bound=SealedSpec)


def load_sealed(model: type[SealedT], path: Path, remedy: str) -> SealedT:
    """Read a document and check its hash; `remedy` says what to do instead of editing.

    Raises
    ------
    InvalidSpec
        The file is not a document of this schema.
    CalibrationError
        It comes from a later kvsim, or was changed after it was written.
    """
    found = load_json(path)
    document = found if isinstance(found, dict) else {}
    refuse_newer(document, path)
    stated = document.pop("content_sha256", None)
    sealed = validate(model, document, str(path))
    if stated != sealed.content_sha256:
        msg = (
            f"{path}: content does not match content_sha256, so the file was changed after it was written; {remedy} "
            "instead of editing"
        )
        raise CalibrationError(msg)
    return sealed
