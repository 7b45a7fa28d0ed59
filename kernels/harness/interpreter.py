"""Make Triton's interpreter compute in bf16 and fp8 by value.

The interpreter keeps bf16 as raw uint16 and multiplies the bit patterns; its cast from fp32 cuts bf16 and loses
carries in fp8, and its cast from fp8 gives numbers for NaN (triton 3.6 to 3.9; triton issue 11584). Here narrow
operands widen to fp32 for each operation, and casts go through torch, which rounds to nearest even.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH_FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    """Give a bf16 or fp8 handle's values as fp32; other handles as they are."""
    if _is_bf16(handle):
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    if handle.dtype.scalar in _TORCH_FP8:
        codes = torch.from_numpy(np.ascontiguousarray(handle.data)).view(_TORCH_FP8[handle.dtype.scalar])
        return interpreter.TensorHandle(codes.float().numpy().reshape(handle.data.shape), tl.float32)
    return handle


def _to_bf16(values: np.ndarray) -> Any:
    values = np.asarray(values, dtype=np.float32)
    rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()
    return interpreter.TensorHandle(rounded.reshape(values.shape), tl.bfloat16)


def _to_fp8(values: np.ndarray, dtype: Any) -> Any:
    """Cast with saturation, as ``cvt.rn.satfinite`` does on NVIDIA GPUs."""
    target = _TORCH_FP8[dtype]
    limit = torch.finfo(target).max
    wide = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).clamp(-limit, limit)
    return interpreter.TensorHandle(wide.to(target).view(torch.uint8).numpy().reshape(values.shape), dtype)


def compute_narrow_floats_by_value() -> None:
    """Patch the interpreter of this process; a second call changes nothing. Call before the first launch."""
    builder = interpreter.InterpreterBuilder
    if not getattr(builder, "computes_narrow_floats_by_value", False):
        _patch_arithmetic(builder)
        _patch_casts(builder)
        builder.computes_narrow_floats_by_value = True


def _patch_arithmetic(builder: Any) -> None:
    plain_dot, plain_binary = builder.create_dot, builder.binary_op
    plain_unary, plain_fma = builder.unary_op, builder.create_fma

    def dot(self: Any, a: Any, b: Any, accumulator: Any, *rest: Any) -> Any:
        return plain_dot(self, _widen(a), _widen(b), accumulator, *rest)

    def binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if not _is_bf16(left):
            return plain_binary(self, left, right, operation)
        result = plain_binary(self, _widen(left), _widen(right), operation)
        return _to_bf16(result.data) if result.data.dtype == np.float32 else result

    def unary(self: Any, argument: Any, operation: Any) -> Any:
        result = plain_unary(self, _widen(argument), operation)
        return _to_bf16(result.data) if _is_bf16(argument) else result

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not _is_bf16(x):
            return plain_fma(self, x, y, z)
        return _to_bf16(_widen(x).data * _widen(y).data + _widen(z).data)

    builder.create_dot, builder.binary_op = dot, binary
    builder.unary_op, builder.create_fma = unary, fma
    builder.get_bf16 = lambda _self, value: _to_bf16(np.array([value], dtype=np.float32))


def _patch_casts(builder: Any) -> None:
    plain_cast, plain_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    narrow = {*_TORCH_FP8, tl.bfloat16}

    def cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar in _TORCH_FP8:
            return _to_fp8(_widen(source).data, target.scalar)
        if target.scalar == tl.bfloat16:
            return source if _is_bf16(source) else _to_bf16(_widen(source).data)
        return plain_cast(self, _widen(source), target)

    def fp_to_fp(self: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if {source.dtype.scalar, target.scalar} & narrow and source.dtype.scalar != target.scalar:
            return cast(self, source, target)
        return plain_fp_to_fp(self, source, target, rounding_mode)

    builder.cast_impl, builder.create_fp_to_fp = cast, fp_to_fp
