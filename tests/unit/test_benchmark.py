"""What the tools count: products of a step, their parts, and the parts of the GPU's command."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tools import benchmark, gpu_day
from tools.benchmark import Products, Side, Turns, operations, parts_table


def counted(work: object) -> int:
    products = Products(lambda: "a part")
    with products:
        work()  # type: ignore[operator]
    return operations({part: [[*key, n] for key, n in of.items()] for part, of in products.found.items()})


def test_products_by_hand() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    products = Products(lambda: "x")
    with products:
        a @ b
        a @ b
        a + 1
    assert products.found == {"x": {(2 * 3 * 5 * 7, 4 * (15 + 35 + 21)): 2}}


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="no kernels")
def test_a_product_in_half_precision_reads_half_the_bytes() -> None:
    packed = torch.ops.quantized.linear_prepack_fp16(torch.ones(7, 5), None)
    products = Products(lambda: "x")
    with products:
        torch.ops.quantized.linear_dynamic_fp16(torch.ones(3, 5), packed)
    assert products.found == {"x": {(2 * 3 * 5 * 7, 4 * (15 + 21) + 2 * 35): 1}}


@pytest.mark.parametrize("groups", [4, 2])  # heads that share keys, too
def test_attention_by_hand(groups: int) -> None:
    query = torch.randn(2, 4, 6, 8, requires_grad=True)
    key, value = (torch.randn(2, groups, 10, 8, requires_grad=True) for _ in range(2))
    forward = 2 * 2 * (2 * 4 * 6 * 10 * 8)  # scores, and their sums of values
    assert counted(lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=groups < 4)) == forward
    out = F.scaled_dot_product_attention(query, key, value, enable_gqa=groups < 4)
    back = counted(lambda: out.sum().backward())
    assert back in (2 * forward, 5 * forward // 2)  # by two products, or with the scores once more


def test_seconds_and_products_are_of_the_innermost_part() -> None:
    turns = Turns("cpu")
    turns.products = Products(turns._part)
    with turns.products, turns.part("outer"):
        torch.ones(2, 2) @ torch.ones(2, 2)
        with turns.part("inner"):
            torch.ones(3, 3) @ torch.ones(3, 3)
        turns.within_part("inner", lambda: torch.ones(3, 3) @ torch.ones(3, 3))()
    assert {part: sum(of.values()) for part, of in turns.products.found.items()} == {"outer": 1, "inner": 2}
    assert turns.seconds.keys() == {"the rest", "outer", "inner"}


def test_the_floor_is_what_binds_each_product() -> None:
    """One product is bound by its operations and one by its bytes."""
    side = Side.__new__(Side)
    side.name, side.steps = "miepo", [{"parts": {"sampling": 3.0, "scoring": 0.5}}]
    lines = parts_table(side, {"sampling": [[100, 10, 1], [10, 200, 2]]}, ceiling=100.0, copy=100.0)
    assert lines[2:] == [
        "| sampling | 3.0 | 0.000 | 0.0 | 5.0 | 0.6 |",
        "| scoring | 0.500 | 0.000 | 0.0 | 0.000 | - |",
    ]


def test_the_quick_workload_gives_way_to_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[benchmark.Workload] = []

    class Seen(Exception):
        pass

    def side(name: str, workload: benchmark.Workload, log: Path) -> None:
        seen.append(workload)
        raise Seen

    monkeypatch.setattr(benchmark, "Side", side)
    for words in ([], ["--quick"], ["--quick", "--batch_size", "3"]):
        with pytest.raises(Seen):
            benchmark.main([*words, "--dtype", "float32", "--device", "cpu"])
    assert [(w.batch_size, w.response_tokens) for w in seen] == [(8, 64), (4, 32), (3, 32)]


def test_parts_of_a_gpu_day_are_kept_as_they_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    late = "print('early', flush=True); import time; time.sleep(60)"
    for name, text in (("good", "print('fine')"), ("bad", "print('half'); raise SystemExit('broken')"), ("late", late)):
        (tmp_path / f"part_{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    parts = [gpu_day.Part("Good", ["part_good"], 30), gpu_day.Part("Bad", ["part_bad"], 30)]
    parts += [gpu_day.Part("Late", ["part_late"], 6), gpu_day.Part("Other", ["part_good"], 30)]
    monkeypatch.setattr(gpu_day, "parts_of", lambda options, folder: parts)
    assert gpu_day.main(["--device", "cpu", "--out", str(tmp_path / "o.md"), "--parts", "Good", "Bad", "Late"]) == 1
    page = (tmp_path / "o.md").read_text()
    assert "fine" in page
    assert "exit status 1:\n\nhalf" in page
    assert "broken" in page
    assert "not finished in 6 s:\n\nearly" in page
    assert "## Other" not in page
    assert gpu_day.main(["--device", "cpu", "--out", str(tmp_path / "o.md"), "--minutes", "0"]) == 1
    assert (tmp_path / "o.md").read_text().count("not begun: the time was over") == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_day_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_day.main([]) == 2
    assert "expected a GPU, there is none" in capsys.readouterr().err


def test_the_parts_of_a_gpu_day_are_commands(tiny_model: Path, tmp_path: Path) -> None:
    """Ways of decoding on tiny shapes; a random base of a shape is one that Transformers reads."""
    options = Namespace(tiny=True, device="cpu", base=str(tiny_model))
    parts = gpu_day.parts_of(options, tmp_path)
    assert [part.title.split(",")[0] for part in parts] == [
        "Tests", "Decoding", "A step beside TRL", "Memory plan", "Compiled policy pass",
    ]  # fmt: skip
    assert (tmp_path / "tiny/config.json").is_file()
    lines = list(gpu_day.decoding(options))
    assert lines[-1].startswith("| 8 | ")
    (head,) = (line for line in lines if line.startswith("| rows |"))
    assert len(lines[-1].split("|")) == len(head.split("|"))
