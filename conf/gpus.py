"""What each GPU offers, by the name users give and by the name the driver reports. Vendor figures, dense.

Measured rates differ: `launch.plan_rates` turns these ceilings into expected speeds.
"""

from __future__ import annotations

from dataclasses import dataclass

from conf.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Ceilings of one GPU. Rates in 1/s.

    Attributes:
        memory: bytes a process may allocate on an otherwise empty card.
        flops: bf16 matrix operations, without sparsity.
        bandwidth: bytes of device memory, read and written together.
        link: bytes sent to the other GPUs of the node, one direction.
        host_link: bytes to host memory, one direction.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    host_link: float


GPUS: dict[str, Gpu] = {
    "a100": Gpu("a100", 79 * GIB, 312e12, 2.0e12, 300e9, 25e9),
    "h100": Gpu("h100", 79 * GIB, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Gpu("h200", 139 * GIB, 989e12, 4.8e12, 450e9, 50e9),
    "b200": Gpu("b200", 178 * GIB, 2250e12, 8.0e12, 900e9, 50e9),
}


def gpu_named(name: str) -> Gpu:
    """The entry of `gpu=name`. Raises UserError for an unknown one."""
    if name not in GPUS:
        raise UserError(f"gpu={name}: unknown; use one of {', '.join(GPUS)}")
    return GPUS[name]


def gpu_of_device(device_name: str) -> Gpu | None:
    """The entry for a driver's name such as `NVIDIA H200`, or None."""
    words = device_name.lower().replace("-", " ").split()
    return next((gpu for key, gpu in GPUS.items() if key in words), None)
