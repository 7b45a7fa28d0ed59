"""Layer profiles of LLMServingSim: ``<org>/<model>/<variant>/meta.yaml`` and ``tp<N>/*.csv`` beside it, µs.

The profiler runs one layer of vLLM eagerly and takes the kernels' times. A decode row has ``kv_decode`` tokens in the
cache and attention reads one more; a prefill row computes ``prefill_chunk`` tokens on top of ``kv_prefill`` cached.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from kvsim.calibration.device_names import resolve_device
from kvsim.calibration.quarantine import exclude
from kvsim.calibration.sources.frames import (
    US,
    build_timings,
    check_columns,
    empty_frame,
    file_origin,
    merge,
    nothing_found,
    read_csv,
)
from kvsim.calibration.timings import Excluded, Timings
from kvsim.documents import load_yaml
from kvsim.errors import InvalidSpec, UnknownName
from kvsim.model_catalog import list_models, load_preset, preset_hub_ids
from kvsim.specs.model import ModelSpec

ORIGIN = "LLMServingSim profiles (KAIST), github.com/casys-kaist/LLMServingSim"
LICENCE = "MIT"
MIXED_BATCH = "prefill and decode in one batch"
NO_LAW = "layer that no operation of kvsim is fitted to"
OTHER_MODEL = "model whose layers are of several kinds, or latent"
UNEVEN = "uneven contexts in one batch"
DTYPES: Mapping[str, str] = {"bf16": "bf16", "fp16": "fp16"}
ATTENTION_KERNEL = "vllm/flash_attn_fa2"
"""What vLLM takes for bf16 on a GPU before Hopper; the profile does not name it."""
GEMM_KERNEL = "vllm/torch.nn.functional.linear"


@dataclass(frozen=True)
class _Profile:
    """One variant of one model on one device at one degree of tensor parallelism."""

    device: str
    version: str
    dtype: str
    model: ModelSpec
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tensor_parallel: int

    def key(self, operation: str, kernel: str) -> dict[str, pl.Expr]:
        """Columns of the key."""
        kv_dtype = "" if operation == "gemm" else self.dtype
        values = (self.device, operation, kernel, self.version, self.dtype, kv_dtype)
        return {
            name: pl.lit(value)
            for name, value in zip(
                ("device", "operation", "kernel", "version", "dtype", "kv_dtype"), values, strict=True
            )
        }

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each linear layer on one rank, as vLLM splits them."""
        hidden, inner = self.model.hidden_size, self.model.intermediate_size or 0
        heads = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return {
            "qkv_proj": (heads, hidden),
            "o_proj": (hidden, self.num_heads * self.head_dim),
            "gate_up_proj": (2 * inner // self.tensor_parallel, hidden),
            "down_proj": (hidden, inner // self.tensor_parallel),
            "lm_head": (self.model.vocab_size // self.tensor_parallel, hidden),
        }


def find_tables(folder: Path) -> list[Path]:
    """``meta.yaml`` files of profiles under `folder`, sorted; one such file is a profile too."""
    paths = [folder] if folder.is_file() else sorted(folder.rglob("meta.yaml"))
    return [path for path in paths if path.name == "meta.yaml" and any(path.parent.glob("tp*"))]


def read(
    folder: Path, devices: Collection[str] | None = None, operations: Collection[str] | None = None
) -> list[Timings]:
    """Read every profile under `folder`; arguments and errors as in `aiconfigurator.read`."""
    wanted = None if devices is None else {resolve_device(name, "devices") for name in devices}
    metas = find_tables(folder)
    if not metas:
        raise nothing_found(folder, "LLMServingSim profile (meta.yaml beside tp<N>/attention.csv)")
    root = folder if folder.is_dir() else folder.parent
    parts: list[Timings] = []
    for meta in metas:
        for place in sorted(meta.parent.glob("tp*")):
            profile = _load_profile(meta, place)
            if wanted is not None and profile.device not in wanted:
                continue
            if len(profile.model.groups) != 1 or profile.model.mla is not None:
                parts.append(_other_model(place))
                continue
            for path in sorted([*place.glob("*.csv"), *place.glob("*.csv.gz")]):
                parts.extend(_read_table(path, root, profile))
    return merge([one for one in parts if operations is None or one.operation in operations])


def _other_model(place: Path) -> Timings:
    """Count the rows of a model whose one profile stands for several kinds of layers."""
    rows = sum(read_csv(path).height for path in [*place.glob("*.csv"), *place.glob("*.csv.gz")])
    return Timings("kernel", empty_frame("kernel"), (Excluded(OTHER_MODEL, rows, "/".join(place.parts[-4:])),))


def _load_profile(meta: Path, place: Path) -> _Profile:
    document = load_yaml(meta)
    degree = re.fullmatch(r"tp(\d+)", place.name)
    if not isinstance(document, dict) or degree is None:
        msg = f"{place}: a profile is a mapping in meta.yaml with folders tp<N> beside it"
        raise InvalidSpec(msg)
    tensor_parallel = int(degree[1])
    device = resolve_device(_text(document, "gpu", meta), f"{meta}: gpu")
    dtype = _text(document, "variant", meta)
    if dtype not in DTYPES:
        msg = f"{meta}: variant: {dtype!r} is not allowed; allowed: {', '.join(DTYPES)}"
        raise InvalidSpec(msg)
    model = _load_model(_text(document, "model", meta), meta)
    group = model.groups[0]
    return _Profile(
        device=device, version=_text(document, "vllm_version", meta), dtype=DTYPES[dtype], model=model,
        num_heads=model.num_attention_heads // tensor_parallel,
        num_kv_heads=max(1, group.num_kv_heads // tensor_parallel), head_dim=group.k_head_dim,
        tensor_parallel=tensor_parallel,
    )  # fmt: skip


def _text(document: Mapping[str, Any], name: str, meta: Path) -> str:
    value = document.get(name)
    if not isinstance(value, str) or not value:
        msg = f"{meta}: {name}: text is needed (got {value!r})"
        raise InvalidSpec(msg)
    return value


def _load_model(name: str, meta: Path) -> ModelSpec:
    """Find the preset of a hub id, also where the id lacks a suffix such as -Instruct; no hub is asked."""
    key = name.lower()
    preset = preset_hub_ids().get(key, key.rpartition("/")[2])
    if preset not in list_models():
        raise UnknownName(kind="model", name=name, known=list_models(), where=f"{meta}: model")
    return load_preset(preset)


def _read_table(path: Path, root: Path, profile: _Profile) -> list[Timings]:
    name = path.name.partition(".")[0]
    if name == "attention":
        return _attention(path, root, profile)
    if name in ("dense", "per_sequence"):
        return _linear(path, root, profile, "tokens" if name == "dense" else "sequences")
    raw = read_csv(path)
    reason = UNEVEN if name.startswith("skew") else NO_LAW
    operation = "decode_attention" if name.startswith("skew") else "kernel"
    return [Timings(operation, empty_frame(operation), (Excluded(reason, raw.height, path.name),))]


def _attention(path: Path, root: Path, profile: _Profile) -> list[Timings]:
    columns = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    raw = check_columns(read_csv(path), path, integers=columns, numbers=("time_us",))
    has_prefill, has_decode = pl.col("prefill_chunk") > 0, pl.col("n_decode") > 0
    raw, mixed = exclude(raw, has_prefill & has_decode, MIXED_BATCH, columns)
    sizes = {
        "num_heads": pl.lit(profile.num_heads), "num_kv_heads": pl.lit(profile.num_kv_heads),
        "head_dim": pl.lit(profile.head_dim), "window_tokens": pl.lit(0), "seconds": pl.col("time_us") * US,
    }  # fmt: skip
    decode = raw.filter(has_decode).select(
        **profile.key("decode_attention", ATTENTION_KERNEL), batch="n_decode",
        context_tokens=pl.col("kv_decode") + 1, **sizes,
    )  # fmt: skip
    prefill = raw.filter(~has_decode).select(
        **profile.key("prefill_attention", ATTENTION_KERNEL), batch=pl.lit(1), prompt_tokens="prefill_chunk",
        context_tokens=pl.col("kv_prefill") + pl.col("prefill_chunk"), **sizes,
    )  # fmt: skip
    origins = [file_origin(path, root, ORIGIN, LICENCE)]
    return [
        *build_timings("decode_attention", decode, mixed, origins),
        *build_timings("prefill_attention", prefill, (), origins),
    ]


def _linear(path: Path, root: Path, profile: _Profile, rows: str) -> list[Timings]:
    raw = check_columns(read_csv(path), path, integers=(rows,), numbers=("time_us",), texts=("layer",))
    shapes = profile.linear_shapes()
    raw, others = exclude(raw, ~pl.col("layer").is_in(list(shapes)), NO_LAW, ("layer", rows))
    frame = raw.select(
        **profile.key("gemm", GEMM_KERNEL), m=rows,
        n=pl.col("layer").replace_strict({name: n for name, (n, _) in shapes.items()}, return_dtype=pl.Int64),
        k=pl.col("layer").replace_strict({name: k for name, (_, k) in shapes.items()}, return_dtype=pl.Int64),
        seconds=pl.col("time_us") * US,
    )  # fmt: skip
    return build_timings("gemm", frame, others, [file_origin(path, root, ORIGIN, LICENCE)])
