"""A GPU for machines that have none: CPU tensors that say they are on one, and refuse to meet those that are not.

A mixture of devices is the mistake that a CPU cannot show. Inside :func:`pretended_gpu` whatever is moved to ``cuda``,
or made there, is a tensor of a class of its own; an operation on one of these and on a plain tensor of the CPU raises as
PyTorch does. Kernels, memory and streams are not pretended.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.overrides import TorchFunctionMode
from torch.utils import _device as default_device
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
# what reads or writes across devices, reads shapes alone, or takes indices of the CPU
ACROSS = {
    "to", "copy_", "cpu", "cuda", "type_as", "expand_as", "view_as", "reshape_as", "is_same_size", "__setitem__",
    "__getitem__", "__set__", "__get__", "is_set_to", "set_", "size", "requires_grad_", "register_hook", "is_tensor",
    "_reduce_ex_internal", "__reduce_ex__", "_has_compatible_shallow_copy_type", "share_memory_", "is_shared",
}  # fmt: skip
# what gives a tensor where its first argument is, whatever the others are
OF_THE_FIRST = {"copy_", "__setitem__", "set_", "expand_as", "view_as", "reshape_as", "__getitem__"}


class OnGpu(torch.Tensor):
    """A tensor that says it is on the GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __deepcopy__(self, memo: Any) -> Any:
        return _gpu(_plain(self).detach().clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self.detach()).__reduce_ex__(protocol)  # a checkpoint is read on the CPU

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def _plain(value: Any) -> Any:
    if not isinstance(value, OnGpu):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(torch.Tensor)


def _gpu(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or isinstance(value, OnGpu):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(OnGpu)


class _Pretending(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func is torch.device or name == "_parse_to":
            return func(*args, **kwargs)
        if name in ("cuda", "cpu"):
            return _gpu(args[0]) if name == "cuda" else _plain(args[0])
        if func in _device_constructors() and kwargs.get("device") is None:
            kwargs["device"] = default_device.CURRENT_DEVICE or CPU
        target = _target(name, args, kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on = [isinstance(x, OnGpu) for x in tensors]
        _check(name, tensors, on, target, kwargs.get("generator"))
        args, kwargs = tree_map(_here, tuple(args)), {key: _here(value) for key, value in kwargs.items()}
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*(tree_map(_plain, args) if name == "to" and target is not None else args), **kwargs)
        if target is not None:
            return tree_map(_gpu if target.type == "cuda" else _plain, found)
        return tree_map(_gpu, found) if (on[0] if name in OF_THE_FIRST and on else any(on)) else found


def _target(name: str, args: Any, kwargs: Any) -> torch.device | None:
    """Return the device that a call names for its result."""
    named = [torch.device(x) for x in (*args[1:2], kwargs.get("device")) if _names_device(x)]
    if named:
        return named[0]
    like = args[1] if name in ("to", "type_as") and len(args) > 1 else None
    return like.device if isinstance(like, torch.Tensor) else None


def _check(name: str, tensors: list[Any], on: list[bool], target: torch.device | None, generator: Any) -> None:
    """Raise what PyTorch does where devices do not fit."""
    if name not in ACROSS and any(on) and any(x.dim() for x, there in zip(tensors, on, strict=True) if not there):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices ({name})")
    if name == "__getitem__" and not on[0] and any(on[1:]):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if target is not None and target.type == "cuda" and generator is not None and generator.device.type == "cpu":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


def _here(value: Any) -> Any:
    return CPU if _names_device(value) and torch.device(value).type == "cuda" else value


def _names_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (
        isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda", "meta")
    )


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


def pretended_trainer() -> dict[str, Any]:
    """Settings of a Trainer that trains on the pretended GPU."""
    return {
        "strategy": SingleDeviceStrategy(device=GPU, accelerator=_Accelerator()),
        "accelerator": "auto",
        "devices": "auto",
    }


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Pretend that there is a GPU."""
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    calls = {
        "synchronize": lambda *_: None, "get_device_capability": lambda *_: (9, 0), "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None, "get_device_name": lambda *_: "none", "current_device": lambda: 0,
        "get_rng_state": lambda *_: torch.get_rng_state(), "set_rng_state": lambda *_: None,
    }  # fmt: skip
    try:
        with mock.patch.multiple(torch.cuda, **calls), _Pretending():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
