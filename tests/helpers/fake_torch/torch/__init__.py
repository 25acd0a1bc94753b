"""A fake PyTorch build with the properties in the FAKE_TORCH_* variables, for `training/torch_probe.py cuda`."""

import os
import warnings
from types import SimpleNamespace

_CUDA = os.environ["FAKE_TORCH_CUDA"] or None
_DEVICES = int(os.environ.get("FAKE_TORCH_DEVICES") or 0)

__version__ = f"2.13.0+cu{_CUDA.replace('.', '')}" if _CUDA else "2.13.0+cpu"
version = SimpleNamespace(cuda=_CUDA)


def _is_available() -> bool:
    if message := os.environ.get("FAKE_TORCH_WARNING"):
        warnings.warn(f"CUDA initialization: {message}", stacklevel=2)
    return _DEVICES > 0


cuda = SimpleNamespace(is_available=_is_available, device_count=lambda: _DEVICES)
