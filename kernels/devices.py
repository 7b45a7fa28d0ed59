"""What launches need to know of the GPU that they run on."""

import torch

ASSUMED_MULTIPROCESSORS = 132
"""Where no GPU is present (an H100's)."""


def num_multiprocessors(tensor: torch.Tensor) -> int:
    """Multiprocessors of the tensor's GPU."""
    if not tensor.is_cuda:
        return ASSUMED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
