"""TurboQuant: rotated keys in the codes of a fixed codebook, as vLLM ships it and as the paper has it.

Planes of codes, in bytes, of one vector of ``D`` elements:

===== ======================================================================================================
bits  arrangement
===== ======================================================================================================
4     D/4 little-endian words of 16 bits; word ``j`` holds elements ``j + i D/4`` in bits ``4i`` up, ``i < 4``
2     D/8 little-endian words of 16 bits; word ``j`` holds elements ``j + i D/8`` in bits ``2i`` up, ``i < 8``
1     D/8 bytes; byte ``j`` holds elements ``j + i D/8`` in bit ``i``, ``i < 8``
3     the low two bits as a plane of 2, the high bit as a plane of 1
===== ======================================================================================================

A kernel so gets a slice of neighbouring elements from neighbouring words by one mask.
"""

import math
from collections.abc import Mapping
from functools import cache
from typing import Literal

import torch

from .base import KvFormat
from .lloyd_max import CUBIC, LLOYD_MAX, Codebook
from .pages import Field, PageLayout

FP8_BITS = 8
SMALLEST_SCALE = 1e-8
"""Step of a vector whose elements are all equal (vLLM's)."""
SMALLEST_NORM = 1e-12
_SIGN_SEED = 2504
_PROJECTION_SEED = 19874


def slices(bits: int) -> int:
    """How many slices of neighbouring elements a plane of codes is read in."""
    return 4 if bits == 4 else 8


def plane_bytes(head_dim: int, bits: int) -> dict[str, int]:
    """Bytes of one vector's planes, by suffix of the field's name."""
    return {"codes": head_dim // 4, "high": head_dim // 8} if bits == 3 else {"codes": head_dim * bits // 8}


def pack_planes(codes: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """Pack codes, (..., D) below ``2**bits``, into planes, uint8, by suffix of the field's name."""
    if bits == 3:
        return {"codes": pack_planes(codes & 3, 2)["codes"], "high": pack_planes(codes >> 2, 1)["codes"]}
    parts = codes.int().unflatten(-1, (slices(bits), -1))
    shifts = bits * torch.arange(slices(bits), device=codes.device, dtype=torch.int32)
    words = (parts << shifts[:, None]).sum(-2)
    if bits == 1:
        return {"codes": words.to(torch.uint8)}
    return {"codes": torch.stack((words & 0xFF, words >> 8), -1).flatten(-2).to(torch.uint8)}


def unpack_planes(planes: Mapping[str, torch.Tensor], bits: int) -> torch.Tensor:
    """Invert `pack_planes`; codes are uint8."""
    if bits == 3:
        return unpack_planes(planes, 2) | unpack_planes({"codes": planes["high"]}, 1) << 2
    words = planes["codes"].int()
    if bits > 1:
        words = words[..., ::2] | words[..., 1::2] << 8
    shifts = bits * torch.arange(slices(bits), device=words.device, dtype=torch.int32)
    return (words[..., None, :] >> shifts[:, None] & (1 << bits) - 1).flatten(-2).to(torch.uint8)


def pack_stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes, (..., D), into a contiguous stream of bits, lowest first, as vLLM stores them."""
    groups = codes.int().unflatten(-1, (-1, 8))
    words = (groups.long() << bits * torch.arange(8, device=codes.device)).sum(-1)
    return (words[..., None] >> 8 * torch.arange(bits, device=codes.device) & 0xFF).flatten(-2).to(torch.uint8)


def unpack_stream(stream: torch.Tensor, bits: int) -> torch.Tensor:
    """Invert `pack_stream`."""
    groups = stream.long().unflatten(-1, (-1, bits))
    words = (groups << 8 * torch.arange(bits, device=stream.device)).sum(-1)
    shifts = bits * torch.arange(8, device=stream.device)
    return (words[..., None] >> shifts & (1 << bits) - 1).flatten(-2).to(torch.uint8)


@cache
def hadamard(head_dim: int, device: str) -> torch.Tensor:
    """Sylvester's Hadamard matrix of +1 and -1, fp32; its own inverse times `head_dim`.

    Raises
    ------
    ValueError
        Unless `head_dim` is a power of two.
    """
    if head_dim & (head_dim - 1):
        raise ValueError(f"a Hadamard matrix needs a power of two, not {head_dim}")
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < head_dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


@cache
def random_signs(head_dim: int, device: str) -> torch.Tensor:
    """Fixed random signs, fp32, that make a Hadamard matrix a random rotation."""
    generator = torch.Generator().manual_seed(_SIGN_SEED)
    return (2.0 * torch.randint(0, 2, (head_dim,), generator=generator) - 1.0).to(device)


@cache
def gaussian_projection(head_dim: int, device: str) -> torch.Tensor:
    """The fixed matrix S of the QJL residual, fp16, entries of N(0, 1)."""
    generator = torch.Generator().manual_seed(_PROJECTION_SEED)
    return torch.randn(head_dim, head_dim, generator=generator).half().to(device)


def quantize_direction(vectors: torch.Tensor, codebook: Codebook) -> tuple[torch.Tensor, torch.Tensor]:
    """Give codes, (..., D), and norms, (..., 1): a vector is about ``norm / sqrt(D) * levels[code]``."""
    norm = vectors.norm(dim=-1, keepdim=True)
    return codebook.quantize(vectors * (math.sqrt(vectors.shape[-1]) / norm.clamp_min(SMALLEST_NORM))), norm


def _require_sliceable(head_dim: int) -> None:
    if head_dim % 16:
        raise ValueError(f"planes of codes need a head_dim that is a multiple of 16, not {head_dim}")


def _vectors(block_size: int, num_kv_heads: int, name: str, num_bytes: int) -> Field:
    return Field(name, torch.uint8, (block_size, num_kv_heads, num_bytes))


class TurboQuant(KvFormat):
    """One of vLLM's presets (PR 38479): rotated keys with a norm, unrotated uniform values with scale and zero.

    ``planar`` is our layout: planes field by field, the norm already divided by that of the quantised direction
    (vLLM's norm correction, which it does on each read). ``inline`` is vLLM's: per token and head, key codes, norm,
    value codes, scale, zero; codes are a stream of bits; the norm is the vector's own, corrected on each read.
    """

    def __init__(
        self,
        preset: str,
        key_bits: int,
        value_bits: int,
        *,
        codebook: Literal["cubic", "lloyd_max"] = "cubic",
        arrangement: Literal["planar", "inline"] = "planar",
        suffix: str = "",
    ) -> None:
        self.name = preset + suffix
        self.strategy = preset
        self.key_bits = key_bits
        self.value_bits = value_bits
        self.arrangement = arrangement
        self.codebook_kind = codebook

    @property
    def rotates_keys(self) -> bool:
        """Whether keys (and so queries) are rotated: not if they are fp8."""
        return self.key_bits != FP8_BITS

    @property
    def codebook(self) -> Codebook:
        """The keys' levels."""
        return (CUBIC if self.codebook_kind == "cubic" else LLOYD_MAX)[self.key_bits]

    def layout(self, *, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> PageLayout:
        _require_sliceable(head_dim)
        shape = (block_size, num_kv_heads)
        fields: list[Field] = []
        if self.rotates_keys:
            fields += self._code_fields("key", self.key_bits, head_dim, *shape)
            fields.append(Field("key_norm", torch.float16, (*shape, 1)))
        else:
            fields.append(Field("key_codes", torch.float8_e4m3fn, (*shape, head_dim)))
        fields += self._code_fields("value", self.value_bits, head_dim, *shape)
        fields += [Field(name, torch.float16, (*shape, 1)) for name in ("value_scale", "value_zero")]
        return PageLayout(tuple(fields), self.arrangement)

    def _code_fields(self, name: str, bits: int, head_dim: int, *shape: int) -> list[Field]:
        sizes = {"codes": head_dim * bits // 8} if self.arrangement == "inline" else plane_bytes(head_dim, bits)
        return [_vectors(*shape, f"{name}_{part}", size) for part, size in sizes.items()]

    def _pack(self, name: str, codes: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        if self.arrangement == "inline":
            return {f"{name}_codes": pack_stream(codes, bits)}
        return {f"{name}_{part}": plane for part, plane in pack_planes(codes, bits).items()}

    def _unpack(self, name: str, fields: Mapping[str, torch.Tensor], bits: int) -> torch.Tensor:
        if self.arrangement == "inline":
            return unpack_stream(fields[f"{name}_codes"], bits)
        planes = {part: fields[f"{name}_{part}"] for part in ("codes", "high") if f"{name}_{part}" in fields}
        return unpack_planes(planes, bits)

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**self._encode_keys(keys), **self._encode_values(values.float())}

    def _encode_keys(self, keys: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.rotates_keys:
            limit = torch.finfo(torch.float8_e4m3fn).max
            return {"key_codes": keys.float().clamp(-limit, limit).to(torch.float8_e4m3fn)}
        head_dim = keys.shape[-1]
        rotated = keys.float() @ hadamard(head_dim, str(keys.device)) / math.sqrt(head_dim)
        codes, norm = quantize_direction(rotated, self.codebook)
        if self.arrangement == "planar":
            norm = norm * math.sqrt(head_dim) / self.codebook.dequantize(codes).norm(dim=-1, keepdim=True)
        return {**self._pack("key", codes, self.key_bits), "key_norm": norm.half()}

    def _encode_values(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        zero, top = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        largest = 2**self.value_bits - 1
        scale = ((top - zero) / largest).clamp_min(SMALLEST_SCALE)
        codes = ((values - zero) / scale + 0.5).floor().clamp(0, largest).to(torch.uint8)
        packed = self._pack("value", codes, self.value_bits)
        return {**packed, "value_scale": scale.half(), "value_zero": zero.half()}

    def decode(self, fields: Mapping[str, torch.Tensor], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rotates_keys:
            levels = self.codebook.dequantize(self._unpack("key", fields, self.key_bits))
            if self.arrangement == "inline":
                levels = levels / levels.norm(dim=-1, keepdim=True) * math.sqrt(head_dim)
            rotated = levels * (fields["key_norm"].float() / math.sqrt(head_dim))
            keys = rotated @ hadamard(head_dim, str(levels.device)) / math.sqrt(head_dim)
        else:
            keys = fields["key_codes"].float()
        codes = self._unpack("value", fields, self.value_bits).float()
        return keys, codes * fields["value_scale"].float() + fields["value_zero"].float()


class TurboQuantPaper(KvFormat):
    """Algorithm 1 or 2 of the paper (arXiv:2504.19874): keys and values rotated, in codes of one codebook.

    ``mse`` (Algorithm 1): codes and a norm. ``prod`` (Algorithm 2): keys have one bit less for codes, and the signs of
    S times what the codes leave over, with its norm; values as for ``mse``. The rotation is a Hadamard matrix times
    random signs. The norms are as the paper has them, without correction. Bytes per vector: ``b D / 8 + 2``, keys of
    ``prod`` 2 more.
    """

    def __init__(self, algorithm: Literal["mse", "prod"], bits: int) -> None:
        self.name = f"turboquant_{algorithm}_{bits}"
        self.bits = bits
        self.has_signs = algorithm == "prod"
        self.key_bits = bits - 1 if self.has_signs else bits

    @property
    def key_codebook(self) -> Codebook:
        """The keys' levels; two levels lie on no cubic and need none."""
        return CUBIC.get(self.key_bits, LLOYD_MAX[1])

    @property
    def value_codebook(self) -> Codebook:
        """The values' levels."""
        return CUBIC[self.bits]

    def layout(self, *, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> PageLayout:
        _require_sliceable(head_dim)
        shape = (block_size, num_kv_heads)
        parts = [(f"key_{part}", size) for part, size in plane_bytes(head_dim, self.key_bits).items()]
        norms = ["key_norm", "value_norm"]
        if self.has_signs:
            parts.append(("key_signs", head_dim // 8))
            norms.insert(1, "key_residual_norm")
        parts += [(f"value_{part}", size) for part, size in plane_bytes(head_dim, self.bits).items()]
        codes = tuple(_vectors(*shape, name, size) for name, size in parts)
        return PageLayout(codes + tuple(Field(name, torch.float16, (*shape, 1)) for name in norms))

    def rotate(self, vectors: torch.Tensor) -> torch.Tensor:
        """Rotate vectors, (..., D), in fp32."""
        head_dim, device = vectors.shape[-1], str(vectors.device)
        return vectors.float() * random_signs(head_dim, device) @ hadamard(head_dim, device) / math.sqrt(head_dim)

    def rotate_back(self, vectors: torch.Tensor) -> torch.Tensor:
        """Invert `rotate`."""
        head_dim, device = vectors.shape[-1], str(vectors.device)
        return vectors @ hadamard(head_dim, device) / math.sqrt(head_dim) * random_signs(head_dim, device)

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        rotated = self.rotate(keys)
        head_dim = keys.shape[-1]
        codes, norm = quantize_direction(rotated, self.key_codebook)
        fields = {f"key_{part}": plane for part, plane in pack_planes(codes, self.key_bits).items()}
        fields["key_norm"] = norm.half()
        if self.has_signs:
            residual = rotated - self.key_codebook.dequantize(codes) * (norm / math.sqrt(head_dim))
            projected = residual @ gaussian_projection(head_dim, str(keys.device)).float().T
            fields["key_signs"] = pack_planes(projected >= 0, 1)["codes"]
            fields["key_residual_norm"] = residual.norm(dim=-1, keepdim=True).half()
        codes, norm = quantize_direction(self.rotate(values), self.value_codebook)
        fields |= {f"value_{part}": plane for part, plane in pack_planes(codes, self.bits).items()}
        return {**fields, "value_norm": norm.half()}

    def decode(self, fields: Mapping[str, torch.Tensor], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys = self._rotated(fields, "key", self.key_bits, self.key_codebook)
        if self.has_signs:
            signs = 2.0 * unpack_planes({"codes": fields["key_signs"]}, 1) - 1.0
            projection = gaussian_projection(head_dim, str(signs.device)).float()
            length = fields["key_residual_norm"].float() * (math.sqrt(math.pi / 2) / head_dim)
            keys = keys + signs @ projection * length
        values = self._rotated(fields, "value", self.bits, self.value_codebook)
        return self.rotate_back(keys), self.rotate_back(values)

    @staticmethod
    def _rotated(fields: Mapping[str, torch.Tensor], name: str, bits: int, codebook: Codebook) -> torch.Tensor:
        planes = {part: fields[f"{name}_{part}"] for part in ("codes", "high") if f"{name}_{part}" in fields}
        levels = codebook.dequantize(unpack_planes(planes, bits))
        return levels * (fields[f"{name}_norm"].float() / math.sqrt(levels.shape[-1]))
