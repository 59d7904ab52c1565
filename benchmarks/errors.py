"""How far from float64 are the operators on this machine, in every dtype and on every backend?

    python benchmarks/errors.py                  # a table; on a GPU: Triton and PyTorch, all dtypes

Each row is one operator and one kind of input, each number the largest difference from the same operator in
float64 on the CPU, relative to the largest entry there: of the outputs, the final states, and the worst of all
gradients. Half-precision inputs are rounded first, so the rounding of inputs does not count, and that of outputs does:
about 4e-3 in bfloat16, 5e-4 in float16.
"""
import argparse
import json
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import kda_lit as kl

NAMES = "q k v g beta initial_state".split()
KINDS = {  # log-decays
    "mild": lambda shape: -torch.rand(shape),
    "none": torch.zeros,
    "resets of -500": lambda shape: -500.0 * (torch.rand(shape) < 0.05) - 0.1 * torch.rand(shape),
    "mixed": lambda shape: torch.tensor([0, -0.01, -1, -80, -500.0])[torch.randint(5, shape)],
}
SIZES = {"K=V=128": (2, 200, 2, 4, 128, 128), "K=100 V=60": (1, 130, 1, 2, 100, 60)}  # B, T, H, HV, K, V
OPERATORS = "chunk_kda fused_recurrent_kda chunk_gated_delta_rule fused_recurrent_gated_delta_rule".split()


def draw(name, kind, size):
    "Inputs of one operator by name, and gradients of its two outputs; in float64."
    torch.manual_seed(0)
    B, T, H, HV, K, V = size
    q, k = F.normalize(torch.randn(2, B, T, H, K), dim=-1)
    g = KINDS[kind]((B, T, HV) if "gated" in name else (B, T, HV, K))
    x = q, k, torch.randn(B, T, HV, V), g, torch.rand(B, T, HV), torch.randn(B, HV, K, V)
    return [t.double() for t in x], (torch.randn(B, T, HV, V).double(), torch.randn(B, HV, K, V).double())


def run(name, x, grads):
    "Outputs, final states and all gradients, in float64 on the CPU."
    x = [t.clone().requires_grad_() for t in x]
    out = getattr(kl, name)(**dict(zip(NAMES, x)), output_final_state=True)
    d = torch.autograd.grad(out, x, [g.to(o) for g, o in zip(grads, out)])
    return [t.detach().double().cpu() for t in (*out, *d)]


def distance(got, want):
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


def rows(device):
    "Every operator, kind, size, backend and dtype that this machine can run."
    backends = ("torch", "triton") if device == "cuda" else ("torch",)
    dtypes = torch.float32, torch.bfloat16, torch.float16
    return [(name, kind, size, backend, dtype) for name in OPERATORS for size in SIZES for kind in KINDS
            for backend in backends for dtype in dtypes]


def measure(name, kind, size, backend, dtype, device):
    "Largest relative errors of o, of S, and of the worst gradient."
    x, grads = draw(name, kind, SIZES[size])
    x = [*(t.to(dtype) for t in x[:5]), x[5].float()]                        # states are never half
    want = run(name, [t.double() for t in x], grads)
    with kl.use_backend(backend): got = run(name, [t.to(device) for t in x], grads)
    o, S, *d = map(distance, got, want)
    return o, S, max(d)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="also write all numbers to this file")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    results = {row: measure(*row, device) for row in tqdm(rows(device), disable=None)}
    print(f"{where}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}: largest relative error of o, S, worst gradient")
    for (name, kind, size, backend, dtype), e in results.items():
        print(f"{name:33}{size:11}{kind:15}{backend:7}{str(dtype)[6:]:9}" + "".join(f"{x:9.0e}" for x in e))
    if args.json:
        with open(args.json, "w") as file: json.dump([[*row[:4], str(row[4]), *e] for row, e in results.items()], file)
    if not all(x == x for e in results.values() for x in e): sys.exit("not a number")


if __name__ == "__main__":
    main()
