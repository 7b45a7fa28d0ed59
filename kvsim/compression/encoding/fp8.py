"""8-bit floating point with one scale per tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Literal

from kvsim.compression.base import KvBytes
from kvsim.compression.encoding.per_vector import PerVectorEncoding
from kvsim.specs.base import DTYPE_BITS, Dtype
from kvsim.specs.model import LayerGroup, LayerKind

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec

SPARSE_MLA_HEAD_DIM: Final = 576
SPARSE_MLA_ROPE_DIM: Final = 64
SPARSE_MLA_SCALE_GROUP: Final = 128


class Fp8(PerVectorEncoding):
    """vLLM ``fp8`` / ``fp8_e4m3`` / ``fp8_e5m2``: one byte per element.

    The fp32 scale per K and V tensor (4 B per layer) is a constant of the model and not part of the cache.
    DeepSeek sparse attention has a layout of its own, vLLM ``fp8_ds_mla``: 512 fp8 + 4 fp32 scales + 64 bf16 RoPE
    elements = 656 B per token and layer.
    """

    names: ClassVar = {"fp8": {"dtype": "e4m3"}, "fp8_e5m2": {"dtype": "e5m2"}}
    aliases: ClassVar = {"fp8_e4m3": "fp8"}
    summaries: ClassVar = {
        "fp8": "8-bit float E4M3, one scale per tensor; vLLM --kv-cache-dtype fp8 (vLLM blog 2026-04-22)",
        "fp8_e5m2": "8-bit float E5M2, more range and less precision; vLLM --kv-cache-dtype fp8_e5m2",
    }

    family: ClassVar = "quantisation"

    kind: Literal["fp8"] = "fp8"
    dtype: Literal["e4m3", "e5m2"] = "e4m3"
    attention_compute_dtype: Literal["auto", "bf16", "fp8"] = "auto"
    """What attention multiplies in. auto: fp8 where the device computes it and the format is e4m3, else bf16."""

    def key_vector_bytes(self, head_dim: int) -> KvBytes:
        return KvBytes(float(head_dim))

    def value_vector_bytes(self, head_dim: int) -> KvBytes:
        return KvBytes(float(head_dim))

    def bytes_per_token(self, group: LayerGroup, native: Dtype) -> KvBytes:
        if group.kind is LayerKind.INDEXED and group.is_latent and not group.shares_kv:
            latent_dim = group.k_head_dim - SPARSE_MLA_ROPE_DIM
            rope_bytes = SPARSE_MLA_ROPE_DIM * DTYPE_BITS[Dtype.BF16] / 8
            return KvBytes(latent_dim + rope_bytes, 4.0 * latent_dim / SPARSE_MLA_SCALE_GROUP)
        return super().bytes_per_token(group, native)

    @property
    def unpack_family(self) -> str | None:
        return "fp8"

    def attention_dtype(self, model: ModelSpec, device: DeviceSpec) -> Dtype:
        native_path = self.dtype == "e4m3" and device.supports(Dtype.FP8)
        if self.attention_compute_dtype == "fp8" or (self.attention_compute_dtype == "auto" and native_path):
            return Dtype.FP8
        return model.dtype

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        for group in model.kv_groups:
            if group.kind is LayerKind.INDEXED and group.is_latent and group.k_head_dim != SPARSE_MLA_HEAD_DIM:
                return (
                    f"fp8 on sparse MLA has one layout (fp8_ds_mla, {SPARSE_MLA_HEAD_DIM} elements), but {model.name} "
                    f"keeps {group.k_head_dim}"
                )
        if self.attention_compute_dtype != "fp8":
            return None
        if not device.supports(Dtype.FP8):
            native = ", ".join(device.native_dtypes.value)
            return (
                f"attention_compute_dtype fp8 needs native fp8 arithmetic, which {device.name} lacks (native: "
                f"{native}); use auto or bf16 to store fp8 and compute in half precision"
            )
        if self.dtype == "e5m2":
            return "attention kernels compute in fp8 only from e4m3 (vLLM FlashAttention 3); use dtype e4m3"
        return None
