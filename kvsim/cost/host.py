"""The host's work of a step: scheduling, input preparation, sampled tokens. Who plans ahead hides it behind the device.

Synchronous scheduling adds it to every step. With asynchronous scheduling the next step is prepared while one runs,
so only a step shorter than the host's work waits for it.
"""

from __future__ import annotations

import numpy as np

from kvsim.cost.step import StepModel
from kvsim.ops import Numeric


def host_seconds(step: StepModel, sequences: Numeric) -> Numeric:
    """Host work of a step of ``sequences``.

    None for llama.cpp, whose loop has no scheduler in Python, and none where a fit to whole engines has it already.
    """
    if step.deployment.engine.kind == "llamacpp" or step.deployment.engine_fit is not None:
        return 0.0 * sequences
    return step.host_step_seconds(sequences)


def exposed_host_seconds(step: StepModel, sequences: int, device_s: float) -> float:
    """What the host's work adds to a step of ``device_s`` on the device."""
    work_s = float(np.asarray(host_seconds(step, sequences)))
    return max(0.0, work_s - device_s) if step.deployment.engine.schedules_ahead else work_s
