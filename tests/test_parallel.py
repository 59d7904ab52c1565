"""Does a training step on two processes, each with half of the batch, do what the same step on one process does?"""
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from helpers import distance
from kda_lit import KDAConfig, KDAForCausalLM

HYBRID = dict(hidden_size=24, head_dim=8, num_heads=2, num_hidden_layers=3, intermediate_size=32, vocab_size=40,
              attn=dict(layers=[1], num_heads=4, num_kv_heads=2))
ON_TWO = """
import sys, torch, torch.distributed as dist
from datetime import timedelta
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from kda_lit import KDAForCausalLM

def shard(model):
    for block in model.model.layers: fully_shard(block)
    return fully_shard(model)

rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timedelta(seconds=60), world_size=2, rank=rank)
for name, wrap in dict(ddp=DistributedDataParallel, fsdp=shard).items():
    model, ids = KDAForCausalLM.from_pretrained(folder).train(), torch.load(f"{folder}/ids.pt")[rank:rank + 1]
    wrapped = wrap(model)
    wrapped(ids, labels=ids).loss.backward()
    torch.optim.SGD(wrapped.parameters(), lr=0.1).step()
    full = {n: (p.full_tensor() if name == "fsdp" else p).detach() for n, p in model.named_parameters()}
    if rank == 0: torch.save(full, f"{folder}/{name}.pt")
dist.barrier()
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.skipif(not dist.is_available(), reason="a torch without distributed")
def test_a_step_on_two_processes_is_a_step_on_one(tmp_path):
    "DistributedDataParallel, and FSDP2 with each block a shard, each process with one row of the batch."
    model, ids, port = KDAForCausalLM(KDAConfig(**HYBRID)).double().train(), torch.randint(40, (2, 70)), str(free_port())
    model.save_pretrained(tmp_path)
    torch.save(ids, tmp_path / "ids.pt")
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    both = [subprocess.Popen([sys.executable, "-c", ON_TWO, str(rank), port, tmp_path], stderr=subprocess.PIPE, text=True,
                             env=os.environ | dict(CUDA_VISIBLE_DEVICES=""))          # gloo is for the CPU
            for rank in range(2)]
    try: said = [process.communicate(timeout=120)[1] for process in both]
    finally: [process.kill() for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    for way in ("ddp", "fsdp"):
        got = torch.load(tmp_path / f"{way}.pt")
        for name, p in model.named_parameters(): assert distance(got[name], p) < 1e-6, (way, name)
