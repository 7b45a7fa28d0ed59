"""Finds a model by preset name, hub id, folder or ``config.json``, and parses it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvsim.data_files import preset_dir
from kvsim.documents import load_json, validate
from kvsim.errors import InvalidSpec, UnknownName
from kvsim.hf_config import parse_hf_config
from kvsim.specs.engine import SamplingSpec
from kvsim.specs.model import ModelSpec

_HUB_ID = re.compile(r"(?P<repo>[\w.\-]+/[\w.\-]+)(?:@(?P<revision>[\w.\-/]+))?")
_OFFLINE_VALUES = {"1", "ON", "YES", "TRUE"}


@lru_cache(maxsize=1)
def list_models() -> tuple[str, ...]:
    """Names of the presets, sorted."""
    return tuple(sorted(path.stem for path in preset_dir("models").glob("*.json")))


def load_model(name: str, *, base_dir: Path | None = None) -> ModelSpec:
    """Load a model.

    Parameters
    ----------
    name
        A preset or its hub id (in any case), a ``config.json``, a folder that holds one, or a hub id
        ``org/name[@revision]``, of which only ``config.json`` is fetched, from the local cache where it is there.
    base_dir
        Folder that relative paths start from; the working folder if None.

    Raises
    ------
    UnknownName
        Nothing has that name; the message suggests near ones.
    InvalidSpec
        The config cannot be read, or says something that kvsim does not know.
    """
    key = name.strip().lower()
    preset = key if key in list_models() else preset_hub_ids().get(key) if "/" in key else None
    if preset is not None:
        return load_preset(preset)
    path = _config_path(name, base_dir)
    if path is not None:
        return _load_file(path, path.stat().st_mtime_ns)
    match = _HUB_ID.fullmatch(name.strip())
    if match is None:
        raise UnknownName(kind="model", name=name, known=list_models())
    return _load_from_hub(match["repo"], match["revision"])


def _config_path(name: str, base_dir: Path | None) -> Path | None:
    """Config file that a name stands for, or None where it is no path."""
    try:
        path = (base_dir or Path()) / Path(name).expanduser()
        is_folder, is_file = bool(name) and path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError):
        return None
    if is_folder:
        path /= "config.json"
        is_file = path.is_file()
    if is_file:
        return path
    if is_folder:
        msg = f"{path.parent}: the folder holds no config.json"
        raise InvalidSpec(msg)
    if path.suffix == ".json" or name.startswith((".", "/", "~")):
        msg = f"{path}: no such config file or folder"
        raise InvalidSpec(msg)
    return None


@lru_cache(maxsize=256)
def load_preset(name: str) -> ModelSpec:
    """Load the preset of exactly that name."""
    path = preset_dir("models") / f"{name}.json"
    document = _preset_document(path)
    source = f"{document['hub_id']} (preset; config from {document['source']}, {document['retrieved']})"
    model = parse_hf_config(document["config"], name=name, source=source)
    stated = document.get("generation")
    if stated is None:
        return model
    return model.model_copy(update={"generation": _generation(path, stated)})


def _generation(path: Path, stated: Any) -> SamplingSpec:
    """Default sampling parameters that a preset quotes, with where from."""
    if not isinstance(stated, Mapping) or not stated.get("source"):
        msg = f"{path}: generation needs a source"
        raise InvalidSpec(msg)
    return validate(SamplingSpec, {key: value for key, value in stated.items() if key != "source"}, str(path))


@lru_cache(maxsize=1)
def preset_hub_ids() -> Mapping[str, str]:
    """Preset name by lower-case hub id."""
    folder = preset_dir("models")
    return {str(_preset_document(folder / f"{name}.json")["hub_id"]).lower(): name for name in list_models()}


def hub_id(name: str) -> str:
    """Name under which the Hugging Face hub has a model: a preset's own, and any other name as it is."""
    key = name.strip().lower()
    if key not in list_models():
        return name
    return str(_preset_document(preset_dir("models") / f"{key}.json")["hub_id"])


def _preset_document(path: Path) -> dict[str, Any]:
    document = load_json(path)
    expected = {"hub_id", "retrieved", "source", "config"}
    if not isinstance(document, dict) or set(document) - {"generation"} != expected:
        msg = f"{path}: a preset has exactly the keys {', '.join(sorted(expected))}, and may have generation"
        raise InvalidSpec(msg)
    return document


@lru_cache(maxsize=64)
def _load_file(path: Path, _mtime_ns: int) -> ModelSpec:
    """Parse a config file; the modification time is part of the cache's key, so that an edit is seen."""
    config = load_json(path)
    name = path.parent.name if path.name == "config.json" else path.stem
    if not isinstance(config, Mapping):
        msg = f"{path}: a config must be an object (got {type(config).__name__})"
        raise InvalidSpec(msg)
    quantization = _modelopt_quantization(path.parent / "hf_quant_config.json")
    if quantization is not None and config.get("quantization_config") is None:
        config = {**config, "quantization_config": quantization}
    return _parse_at(path, config, name or path.stem, str(path))


def _modelopt_quantization(path: Path) -> dict[str, Any] | None:
    """Weight format that NVIDIA's ModelOpt writes beside the config, or None where there is no such file."""
    if not path.is_file():
        return None
    document = load_json(path)
    quantization = document.get("quantization") if isinstance(document, Mapping) else None
    if not isinstance(quantization, Mapping):
        msg = f"{path}: needs an object 'quantization'"
        raise InvalidSpec(msg)
    return {"quant_method": "modelopt", **quantization}


@lru_cache(maxsize=64)
def _load_from_hub(repo_id: str, revision: str | None) -> ModelSpec:
    path = _hub_config_path(repo_id, revision)
    source = f"{repo_id}@{revision}" if revision else repo_id
    return _parse_at(path, load_json(path), repo_id, source)


def _parse_at(path: Path, config: Any, name: str, source: str) -> ModelSpec:
    try:
        return parse_hf_config(config, name=name, source=source)
    except InvalidSpec as error:
        msg = f"{path}: {error}"
        raise InvalidSpec(msg) from error


def _hub_config_path(repo_id: str, revision: str | None) -> Path:
    """Path of ``config.json`` in the hub's cache; fetched only if it is not there and the hub may be asked."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
        from huggingface_hub.utils import validate_repo_id
    except ImportError as error:
        msg = f"model {repo_id!r} is no preset or file; to read it from the hub: pip install 'kvsim[hub]'"
        raise InvalidSpec(msg) from error
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        msg = f"{repo_id!r} is not a valid hub id: {error}"
        raise InvalidSpec(msg) from error
    try:
        return Path(hf_hub_download(repo_id, "config.json", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in _OFFLINE_VALUES:
            msg = f"{repo_id}: config.json is not in the local hub cache, and HF_HUB_OFFLINE forbids fetching it"
            raise InvalidSpec(msg) from None
    try:
        return Path(hf_hub_download(repo_id, "config.json", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        near = ", ".join(UnknownName("model", repo_id.rpartition("/")[2], list_models()).suggestions)
        hint = f"; presets with a like name: {near}" if near else ""
        msg = f"{repo_id}: config.json is not in the local hub cache and could not be fetched: {reason}{hint}"
        raise InvalidSpec(msg) from error
