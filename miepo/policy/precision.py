"""The type in which a policy computes: bfloat16 where the device computes it natively, float32 elsewhere."""

from __future__ import annotations

import os
import platform

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

# values of oneDNN's ONEDNN_MAX_CPU_ISA that leave out its native bfloat16 kernels
WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
EMULATED = "about 15 times slower than float32 (a step of the quickstart on AVX2: 232 s and 13 s)"


def native_bfloat16(device: torch.device) -> tuple[bool, str]:
    """Return whether a device computes bfloat16 natively, and why.

    CUDA devices do from compute capability 8.0 on, x86 CPUs with AVX512-BF16 or AMX-BF16, Arm CPUs with their BF16
    extension. What keeps PyTorch's libraries from using it counts, too (``ATEN_CPU_CAPABILITY``,
    ``ONEDNN_MAX_CPU_ISA``).

    Returns:
        The answer, and its reason as the end of a sentence.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"compute capability {major}.{minor}, native from 8.0 on"
    if device.type != "cpu":
        return False, f"a device of type {device.type}, of which it is not known to be native"
    if platform.machine().lower() in ("arm64", "aarch64"):
        native = torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return native, f"a CPU with{'' if native else 'out'} Arm's BF16 extension"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if limit in WITHOUT_BFLOAT16:
        return False, f"a CPU limited to {limit} by ONEDNN_MAX_CPU_ISA"
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False, f"a CPU of capability {torch.backends.cpu.get_cpu_capability()}"
    found = [
        name
        for name, has in (("AVX512-BF16", "_is_avx512_bf16_supported"), ("AMX-BF16", "_is_amx_tile_supported"))
        if getattr(torch.cpu, has)()
    ]
    return bool(found), f"a CPU with {' and '.join(found)}" if found else "a CPU without AVX512-BF16 or AMX-BF16"


def chosen_dtype(dtype: str, device: torch.device) -> str:
    """Return ``float32`` or ``bfloat16`` for ``auto``, said in one line; what is asked for otherwise.

    Warns where bfloat16 is asked for and the device emulates it.
    """
    native, reason = native_bfloat16(device)
    if dtype == "auto":
        dtype = "bfloat16" if native else "float32"
        rank_zero_info(f"The policy computes in {dtype}: {reason} (policy.dtype auto)")
    elif dtype == "bfloat16" and device.type == "cpu" and not native:
        rank_zero_warn(f"policy.dtype bfloat16 is emulated here, {EMULATED}: {reason}; auto takes float32")
    return dtype
