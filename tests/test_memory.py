"""How much memory do the forward pass of a real size and the loss of a large vocabulary take, above what their inputs take?"""
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


MEASURE_LOSS = """
import re, torch
from kda_lit import KDAConfig, KDAForCausalLM
def now(field): return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 2**20
torch.set_num_threads(1)
config = KDAConfig(hidden_size=32, head_dim=16, num_heads=2, num_hidden_layers=1, intermediate_size=32, vocab_size=32000,
                   fuse_linear_cross_entropy=True)
model, ids = KDAForCausalLM(config).train(), torch.randint(32000, (1, 8192))
model(ids[:, :64], labels=ids[:, :64]).loss.backward()
before = now("VmRSS")
model(ids, labels=ids).loss.backward()
print(now("VmHWM") - before)
"""


@pytest.mark.skipif(not STATUS.exists(), reason="reads Linux' own peak of the process")
def test_training_on_8192_tokens_of_32000():
    "The logits alone would take 0.98 GiB, and the loss makes several tensors of that size."
    peak = subprocess.run([sys.executable, "-c", MEASURE_LOSS], capture_output=True, text=True, check=True).stdout
    assert float(peak) < 0.98, f"{float(peak):.2f} GiB"
