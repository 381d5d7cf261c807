"""For which device a program is being made: the one at hand, or one that is told (`compiling_for`)."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax


@dataclasses.dataclass(frozen=True)
class Device:
    """What decides which implementations run."""

    platform: str  # "cpu" or "gpu"
    kind: str  # as its maker calls it
    capability: tuple[int, int] = (0, 0)  # of a CUDA device: (9, 0) is an H100

    @property
    def runs_triton(self) -> bool:
        """Whether Pallas's kernels can be compiled for it: a CUDA GPU of sm_80 or later."""
        return self.platform == "gpu" and self.capability >= (8, 0)


H100 = Device("gpu", "NVIDIA H100 80GB HBM3", (9, 0))

_told: contextvars.ContextVar[Device | None] = contextvars.ContextVar("compiling for", default=None)


def current() -> Device:
    """The device that is traced for."""
    return _told.get() or _at_hand()


@contextlib.contextmanager
def compiling_for(device: Device) -> Iterator[None]:
    """Trace for a device that need not be there. JAX remembers what it has traced: give it functions of your own."""
    token = _told.set(device)
    try:
        yield
    finally:
        _told.reset(token)


def _at_hand() -> Device:
    device = jax.devices()[0]
    major, _, minor = getattr(device, "compute_capability", "0.0").partition(".")
    return Device(jax.default_backend(), device.device_kind, (int(major), int(minor or 0)))
