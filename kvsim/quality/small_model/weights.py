"""Weights of trained models on disk, with the log of their training and a hash of what was learned."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kvsim.errors import InvalidSpec
from kvsim.quality.small_model.architecture import Shape, SmallTransformer
from kvsim.quality.small_model.recipe import RECIPE
from kvsim.quality.small_model.training import TrainingLog, train


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A model with the record of how it came to be."""

    name: str
    model: SmallTransformer
    record: dict[str, Any]


def cache_dir() -> Path:
    """Folder of the user's own where trained weights are kept."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "kvsim" / "small_model"


def model_name(architecture: str, seed: int) -> str:
    """Name of a model and of its files."""
    return f"{architecture}-seed{seed}"


def load_or_train(
    architecture: str, seed: int, folder: Path | None = None, report: Callable[[str], None] | None = None
) -> TrainedModel:
    """Give a trained model: from ``folder`` where it lies there, else trained now and put there.

    Raises
    ------
    NotConverged
        Training missed its criterion.
    InvalidSpec
        The files are not of this model, or the weights are not those that the record names.
    """
    folder = folder or cache_dir()
    name = model_name(architecture, seed)
    if not (folder / f"{name}.safetensors").exists():
        _save(folder, name, *train(Shape(architecture), seed, RECIPE, report))
    return _load(folder, name, architecture)


def weights_hash(model: SmallTransformer) -> str:
    """SHA-256 over all weights in the order of their names."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _save(folder: Path, name: str, model: SmallTransformer, log: TrainingLog) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {**asdict(log), "weights_sha256": weights_hash(model), "cpu": torch.backends.cpu.get_cpu_capability()}
    record["parameters"] = sum(tensor.numel() for tensor in model.parameters())
    save_file(model.state_dict(), folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _load(folder: Path, name: str, architecture: str) -> TrainedModel:
    record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    shape = Shape(architecture)
    if record["shape"] != shape.as_dict():
        msg = f"{folder / name}.json: shape {record['shape']} is not {shape.as_dict()}; remove the files to train anew"
        raise InvalidSpec(msg)
    model = SmallTransformer(shape)
    model.load_state_dict(load_file(folder / f"{name}.safetensors"))
    model.eval()
    if weights_hash(model) != record["weights_sha256"]:
        msg = f"{folder / name}.safetensors: weights are not those that {name}.json names; remove both to train anew"
        raise InvalidSpec(msg)
    return TrainedModel(name, model, record)
