"""The type a policy computes in is that of the machine, and said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from miepo.errors import UserError
from miepo.policy import GatedConditioning, Policy, base_model, precision
from miepo.policy.precision import chosen_dtype, native_bfloat16

CPU = torch.device("cpu")


def machine(
    monkeypatch: pytest.MonkeyPatch,
    capability: str = "AVX512",
    avx: bool = False,
    amx: bool = False,
    name: str = "x86_64",
) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(precision.platform, "machine", lambda: name)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


@pytest.mark.parametrize(
    ("capability", "avx", "amx", "native", "reason"),
    [
        ("AVX512", True, False, True, "a CPU with AVX512-BF16"),
        ("AVX512", True, True, True, "a CPU with AVX512-BF16 and AMX-BF16"),
        ("AVX512", False, False, False, "a CPU without AVX512-BF16 or AMX-BF16"),
        ("AVX2", True, True, False, "a CPU of capability AVX2"),  # what ATEN_CPU_CAPABILITY=avx2 makes of one
    ],
)
def test_cpus(
    monkeypatch: pytest.MonkeyPatch, capability: str, avx: bool, amx: bool, native: bool, reason: str
) -> None:
    machine(monkeypatch, capability, avx, amx)
    assert native_bfloat16(CPU) == (native, reason)


def test_what_the_libraries_may_not_use_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, avx=True)
    for limit, native in (("AVX2", False), ("avx512_core", False), ("AVX512_CORE_BF16", True), ("DEFAULT", True)):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert native_bfloat16(CPU)[0] is native


def test_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, native in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert native_bfloat16(torch.device("cuda:0"))[0] is native
    assert not native_bfloat16(torch.device("meta"))[0]
    machine(monkeypatch, name="aarch64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert native_bfloat16(CPU) == (True, "a CPU with Arm's BF16 extension")


@pytest.mark.parametrize("native", [True, False])
def test_auto_says_what_it_takes_and_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, native: bool, tiny_model: Path
) -> None:
    machine(monkeypatch, avx=native)
    dtype = "bfloat16" if native else "float32"
    with caplog.at_level("INFO"):
        policy = Policy(str(tiny_model), [GatedConditioning()], lora_rank=2).build(["a", "b"])
    assert policy.weight_dtype == getattr(torch, dtype)
    assert f"The policy computes in {dtype}: a CPU with" in caplog.text
    assert chosen_dtype("float32", CPU) == "float32"


def test_bfloat16_that_is_emulated_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    with pytest.warns(UserWarning, match="bfloat16 is emulated here, about 15 times slower than float32"):
        assert chosen_dtype("bfloat16", CPU) == "bfloat16"
    machine(monkeypatch, amx=True)
    assert chosen_dtype("bfloat16", CPU) == "bfloat16"


def test_weights_that_memory_does_not_hold_are_refused_before_they_are_read(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(str(tiny_model), [GatedConditioning()], lora_rank=2, dtype="float32")
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    monkeypatch.setattr(base_model.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was read"))
    for free, hint in (
        (4 * weights - 1, "more memory or policy.dtype bfloat16, which takes"),
        (weights, "more memory$"),
    ):
        monkeypatch.setattr(base_model.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        with pytest.raises(UserError, match=rf"take 0.0 GB in float32, and 0.0 GB of memory are free: .*{hint}"):
            policy.build(["a", "b"])


def test_a_resume_in_another_precision_is_told(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    from miepo import MIEPO

    module = MIEPO(Policy(str(tiny_model), [GatedConditioning()], lora_rank=2, dtype="float32"))
    module.policy.build([])
    limits = {"max_epochs": 1, "max_steps": -1, "limit_train_batches": 1.0}
    module._trainer = SimpleNamespace(state=SimpleNamespace(fn="validate"), datamodule=None, callbacks=[], **limits)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["miepo"]["precision"] == "float32"
    checkpoint["miepo"]["precision"] = "bfloat16"
    with caplog.at_level("INFO"):
        module.on_load_checkpoint(checkpoint)
    assert "was trained in bfloat16; the policy computes in float32 here" in caplog.text
