from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from miepo.callbacks.throughput import peak_memory


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not tell them apart")
def test_peak_memory_is_that_of_this_process_and_not_of_the_one_that_started_it() -> None:
    large = torch.ones(4 * 10**8)  # 1.6 GB
    assert peak_memory(torch.device("cpu")) > 1.6
    code = "import torch; from miepo.callbacks.throughput import peak_memory; print(peak_memory(torch.device('cpu')))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 0.05 < float(out) < 1.5
    del large
