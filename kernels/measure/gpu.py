"""The GPU under test: its name and target, and its sensors by NVML."""

import ctypes
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

from ..contract import TARGETS

_NVML_CLOCK_SM, _NVML_CLOCK_MEMORY, _NVML_TEMPERATURE_GPU = 1, 2, 0
_DRIVER_CHARACTERS = 80


@dataclass(frozen=True)
class Reading:
    """One look at the sensors; None where the driver does not say.

    Attributes
    ----------
    power_w : float or None
        Averaged by the driver, over a second on Hopper.
    throttle_reasons : int or None
        Bits as in nvmlClocksThrottleReasons.
    energy_j : float or None
        Since the driver was loaded.
    """

    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    throttle_reasons: int | None = None
    energy_j: float | None = None


class Sensors:
    """NVML by ctypes: a subprocess of nvidia-smi takes longer than the kernels. Every reading is None without NVML."""

    def __init__(self, uuid: str | None) -> None:
        self._library: Any = None
        self._device = ctypes.c_void_p()
        if uuid is None:
            return
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        # NVML writes "GPU-" before what torch calls the UUID.
        name = (uuid if uuid.startswith("GPU-") else f"GPU-{uuid}").encode()
        handle = ctypes.byref(self._device)
        if library.nvmlInit_v2() == 0 and (
            library.nvmlDeviceGetHandleByUUID(name, handle) == 0 or _only_device(library, handle)
        ):
            self._library = library

    def _ask(self, function: str, kind: Any, *before: int) -> int | None:
        if self._library is None:
            return None
        value = kind()
        try:
            status = getattr(self._library, function)(self._device, *before, ctypes.byref(value))
        except AttributeError:
            return None
        return int(value.value) if status == 0 else None

    def read(self) -> Reading:
        """Look at all sensors; takes some tens of microseconds."""
        power_mw = self._ask("nvmlDeviceGetPowerUsage", ctypes.c_uint)
        energy_mj = self._ask("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong)
        return Reading(
            sm_clock_mhz=self._ask("nvmlDeviceGetClockInfo", ctypes.c_uint, _NVML_CLOCK_SM),
            memory_clock_mhz=self._ask("nvmlDeviceGetClockInfo", ctypes.c_uint, _NVML_CLOCK_MEMORY),
            power_w=None if power_mw is None else power_mw / 1e3,
            temperature_c=self._ask("nvmlDeviceGetTemperature", ctypes.c_uint, _NVML_TEMPERATURE_GPU),
            throttle_reasons=self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong),
            energy_j=None if energy_mj is None else energy_mj / 1e3,
        )

    def power_limit_w(self) -> float | None:
        """Give the enforced power limit."""
        milliwatts = self._ask("nvmlDeviceGetEnforcedPowerLimit", ctypes.c_uint)
        return None if milliwatts is None else milliwatts / 1e3

    def max_sm_clock_mhz(self) -> float | None:
        """Give the highest SM clock that the GPU may reach."""
        return self._ask("nvmlDeviceGetMaxClockInfo", ctypes.c_uint, _NVML_CLOCK_SM)

    def driver(self) -> str:
        """Give the driver's version, empty where it is not known."""
        if self._library is None:
            return ""
        text = ctypes.create_string_buffer(_DRIVER_CHARACTERS)
        return text.value.decode() if self._library.nvmlSystemGetDriverVersion(text, len(text)) == 0 else ""


def _only_device(library: Any, handle: Any) -> bool:
    """Find the GPU where there is one only, whatever its name."""
    num_devices = ctypes.c_uint()
    library.nvmlDeviceGetCount_v2(ctypes.byref(num_devices))
    return num_devices.value == 1 and library.nvmlDeviceGetHandleByIndex_v2(0, handle) == 0


def sensor_columns(readings: Sequence[Reading]) -> dict[str, Any]:
    """Summarise readings for a row: medians, the lowest SM clock, and all throttle bits that were set."""

    def known(name: str) -> list[Any]:
        return [value for reading in readings if (value := getattr(reading, name)) is not None]

    columns: dict[str, Any] = {
        name: statistics.median(values) if (values := known(name)) else ""
        for name in ("sm_clock_mhz", "memory_clock_mhz", "power_w", "temperature_c")
    }
    throttle = 0
    for bits in known("throttle_reasons"):
        throttle |= bits
    columns["sm_clock_min_mhz"] = min(known("sm_clock_mhz"), default="")
    columns["throttle_reasons"] = f"{throttle:#x}" if known("throttle_reasons") else ""
    return columns


@dataclass(frozen=True)
class Machine:
    """Where rows are taken.

    Attributes
    ----------
    device : {'cuda', 'cpu'}
    target : str
        Whose configurations are timed: the GPU's own, or the nearest of `contract.TARGETS`.
    """

    device: str
    gpu: str
    gpu_uuid: str
    driver: str
    target: str
    l2_bytes: int
    total_bytes: int
    facts: dict[str, Any] = field(default_factory=dict)

    def columns(self) -> dict[str, Any]:
        """Give the columns that are the same in every row."""
        return {
            "device": self.device,
            "basis": "measured" if self.device == "cuda" else "interpreter",
            "gpu": self.gpu,
            "gpu_uuid": self.gpu_uuid,
            "driver": self.driver,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "target": self.target,
        }


def nearest_target(architecture: str) -> str:
    """Give the member of `contract.TARGETS` whose tilings fit an architecture, such as ``sm_89`` or ``gfx950``."""
    if architecture in TARGETS:
        return architecture
    if architecture.startswith("gfx"):
        return "gfx942"
    capability = int(architecture.removeprefix("sm_"))
    if capability in {86, 87, 88, 89} or capability >= 120:
        # 99 KiB of shared memory per program.
        return "sm_120"
    return "sm_100" if capability >= 100 else "sm_80"


def describe(device: str) -> Machine:
    """Describe the machine: the current GPU, or this computer where Triton's interpreter runs."""
    if device == "cpu":
        return Machine("cpu", platform.machine(), "", "", "sm_90", 0, 0)
    properties = torch.cuda.get_device_properties(0)
    if torch.version.hip:
        architecture = properties.gcnArchName.partition(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    uuid = str(getattr(properties, "uuid", ""))
    sensors = Sensors(uuid or None)
    return Machine(
        device="cuda",
        gpu=properties.name,
        gpu_uuid=uuid,
        driver=sensors.driver(),
        target=nearest_target(architecture),
        l2_bytes=getattr(properties, "L2_cache_size", 0),
        total_bytes=properties.total_memory,
        facts={
            "architecture": architecture,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "power_limit_w": sensors.power_limit_w(),
            "max_sm_clock_mhz": sensors.max_sm_clock_mhz(),
            "at_start": vars(sensors.read()),
            "platform": platform.platform(),
            "taken_unix_s": time.time(),
        },
    )
