"""How much memory does the forward pass of a real size take, above what its inputs take?"""
import subprocess
import sys
from pathlib import Path

import pytest

STATUS = Path("/proc/self/status")
MEASURE = """
import re, torch
from kda_lit import chunk_kda
def now(field): return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 2**20
def inputs(T): return [*(torch.randn(1, T, 8, 128) for _ in "qkv"), -torch.rand(1, T, 8, 128), torch.rand(1, T, 8)]
torch.set_num_threads(1)
with torch.no_grad():
    chunk_kda(*inputs(64), use_qk_l2norm_in_kernel=True)         # what torch sets up once is not ours
    x = inputs(2048)
    before = now("VmRSS")
    chunk_kda(*x, use_qk_l2norm_in_kernel=True)
print(now("VmHWM") - before)
"""


@pytest.mark.skipif(not STATUS.exists(), reason="reads Linux' own peak of the process")
def test_forward_of_2048_tokens():
    "The limit is 1 GiB; one tensor [C, C, K] for all chunks and heads would take 0.5 GiB alone, so stay below that."
    peak = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True).stdout
    assert float(peak) < 0.5, f"{float(peak):.2f} GiB"
