"""Transform coding of rows in plain torch."""

from collections.abc import Mapping
from typing import Any

import torch


def kvtc_encode_reference(rows: torch.Tensor, transform: Mapping[str, Any]) -> torch.Tensor:
    """Give uint8 codes, (num_rows, num_components); the product takes rows in the basis' dtype and adds up in fp32."""
    centred = (rows.float() - transform["mean"]).to(transform["basis"].dtype)
    coordinates = centred.float() @ transform["basis"].float()
    code = (coordinates / transform["step"]).floor() + transform["levels"] // 2
    return code.clamp_min(0).minimum(transform["levels"] - 1).to(torch.uint8)


def kvtc_decode_reference(codes: torch.Tensor, transform: Mapping[str, Any]) -> torch.Tensor:
    """Give rows in fp32, (num_rows, num_channels): each code stands for the middle of its step."""
    coordinates = (codes.float() - transform["levels"] // 2 + 0.5) * transform["step"]
    return coordinates @ transform["basis"].float().T + transform["mean"]
