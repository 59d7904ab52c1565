"""How fast is KDA on a GPU: this library, the reference library, and PyTorch's causal attention, in one process.

    python benchmarks/h200.py                          # kda_lit and attention
    python benchmarks/h200.py --peer                   # and the reference library; its first calls take minutes
    python benchmarks/h200.py --only forward/A --minutes 5
    python benchmarks/h200.py --table build/h200.json  # print what an earlier run has written

The reference library wants a place of its own, so that it never meets this project's environment:

    pip install --no-deps --target build/reference fla-core==0.6.0 flash-linear-attention==0.6.0 einops
    PYTHONPATH=build/reference python benchmarks/h200.py --peer

Times are medians by CUDA events, with the L2 cache flushed before each run; inputs are larger than that cache in any case,
except where one or a few tokens are decoded. 128 channels, bfloat16, raw gates as a layer is initialised with, unit keys.
Errors are of the same call on a small input, in the norm, against the recurrence in float64. Memory is the peak above what
was there before the call. `host` are the milliseconds that the processor needs for a call; where they exceed those of the
GPU, a model waits for them, unless it replays a graph. `floor` is the share that the reading and writing of inputs and outputs alone would take of the
time, and `copy`, where tokens are decoded, the share of the bandwidth of a copy. `first_s` are the seconds of the first call,
compilation and search for launch options included; with --cold, nothing is compiled before.
"""
import argparse
import json
import math
import os
import tempfile
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = "1"         # its own kernels, not those of others that it finds

import torch
import torch.nn.functional as F
from tqdm import tqdm

DEVICE, D = "cuda", 128
SHAPES = {"A": (1, 8192, 64), "B": (1, 32768, 32), "C": (8, 2048, 32)}      # B, T, H
BOUNDS = {"bounded": -5.0, "softplus": None}
DECODED = (1, 4, 16, 64, 256)                            # sequences of 32 heads, a token each
LEAST = {"forward": 2 * (5 * D + 1), "training": 2 * (14 * D + 3)}          # bytes a token and head
FLAGS = dict(use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True)
COLUMNS = {"ms": "{:9.3f}", "host": "{:9.3f}", "first_s": "{:9.1f}", "launches": "{:9d}", "MiB": "{:9.0f}", "floor": "{:9.1%}",
           "copy": "{:9.1%}", "error": "{:9.1e}"}


def rows(peer):
    "Names of everything to measure: task/shape/gate/who."
    libraries = ("kda_lit", "fla") if peer else ("kda_lit",)
    for task in ("forward", "training"):
        for shape in SHAPES:
            yield from (f"{task}/{shape}/{gate}/{who}" for gate in BOUNDS for who in libraries)
            yield f"{task}/{shape}/-/attention"
    yield from (f"decode/{n}/-/{who}" for n in DECODED for who in libraries)


# ---- inputs

def layer(B, T, H, dtype=torch.bfloat16):
    "Inputs of a layer, and the parameters of its gate as they are initialised."
    new = lambda *size: torch.randn(size, device=DEVICE).to(dtype)
    step = torch.empty(H * D, device=DEVICE).uniform_(math.log(1e-3), math.log(0.1)).exp()
    gates = dict(A_log=torch.empty(H, device=DEVICE).uniform_(1, 16).log(), dt_bias=step + torch.log(-torch.expm1(-step)))
    return dict(q=new(B, T, H, D), k=new(B, T, H, D), v=new(B, T, H, D), g=0.1 * new(B, T, H, D), beta=new(B, T, H)), gates


def one_token(N, H=32):
    "What decoding a token takes: log-decays, strengths and states."
    x, _ = layer(N, 1, H)
    g, beta = -0.1 * torch.rand_like(x["g"], dtype=torch.float32), x["beta"].float().sigmoid()
    return x | dict(g=g, beta=beta, initial_state=torch.randn(N, H, D, D, device=DEVICE))


# ---- what is called

def library(who):
    "chunk_kda and fused_recurrent_kda."
    if who == "fla":
        from fla.ops.kda import chunk_kda, fused_recurrent_kda
        return chunk_kda, fused_recurrent_kda
    from kda_lit import chunk_kda, fused_recurrent_kda
    return chunk_kda, fused_recurrent_kda


def with_gradients(f, leaves):
    "A function that calls f and takes the gradients of its outputs' sum."
    def run():
        o = f()
        return o, torch.autograd.grad(o, leaves, torch.ones_like(o))
    return run


def task_of(name, size=None):
    "A function to time, its tensors, and the options that an error has to know; `size` in place of the named shape."
    task, shape, gate, who = name.split("/")
    if task == "decode":
        x = one_token(size or int(shape))
        f = library(who)[1]
        return (lambda: f(**x, output_final_state=True, use_qk_l2norm_in_kernel=True)), x, {}
    B, T, H = size or SHAPES[shape]
    x, gates = layer(B, T, H)
    if who == "attention":
        x = {key: x[key].transpose(1, 2).contiguous() for key in "qkv"}
        f, options = (lambda: F.scaled_dot_product_attention(*x.values(), is_causal=True)), {}
    else:
        options = gates | dict(lower_bound=BOUNDS[gate], safe_gate=BOUNDS[gate] is not None)
        call = library(who)[0]
        f = lambda: call(**x, **FLAGS, **options)[0]
    if task == "training":
        leaves = [*x.values(), *(gates.values() if who != "attention" else ())]
        for leaf in leaves: leaf.requires_grad_()
        f = with_gradients(f, leaves)
    return f, x, options


def exact(name, x, options):
    "What the call of `task_of` should return, by the recurrence in float64."
    from kda_lit import naive_recurrent_kda
    task, who, leaves = name.split("/")[0], name.split("/")[-1], {}
    double = {key: t.detach().double().cpu().requires_grad_(task == "training") for key, t in (x | options).items()
              if isinstance(t, torch.Tensor)}
    if who == "attention":
        o = F.scaled_dot_product_attention(*double.values(), is_causal=True)
        return (o, torch.autograd.grad(o, [*double.values()], torch.ones_like(o))) if task == "training" else o
    y = {key: double[key] for key in ("q", "k", "v", "g", "beta")}
    y["q"], y["k"] = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (y["q"], y["k"]))
    if task == "decode": return naive_recurrent_kda(**y, initial_state=double["initial_state"], output_final_state=True)
    rate, z, bound = double["A_log"].exp()[:, None], y["g"] + double["dt_bias"].view(y["g"].shape[2:]), options["lower_bound"]
    y["g"] = -rate * F.softplus(z, threshold=60) if bound is None else bound * torch.sigmoid(rate * z)
    y["beta"] = y["beta"].sigmoid()
    o, _ = naive_recurrent_kda(**y)
    return (o, torch.autograd.grad(o, [*double.values()], torch.ones_like(o))) if task == "training" else o


def error(name):
    "The largest error among all that is returned, each relative to its norm."
    f, x, options = task_of(name, 4 if name.startswith("decode") else (2, 200, 2))
    flat = lambda y: [y] if isinstance(y, torch.Tensor) else [t for part in y for t in flat(part)]
    with torch.set_grad_enabled(name.startswith("training")): got = flat(f())
    return max(((a.detach().double().cpu() - b).norm() / b.norm()).item() for a, b in zip(got, flat(exact(name, x, options)), strict=True))


# ---- measuring

def milliseconds(f, seconds=3, most=50):
    "Medians of the GPU's time and of the host's, of as many runs as fit into some seconds, at least 5."
    flush, times, start = torch.empty(2**31, dtype=torch.uint8, device=DEVICE), [], time.perf_counter()
    while len(times) < 7 or (len(times) < most and time.perf_counter() - start < seconds):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()                                    # takes half a millisecond, which lets the host run ahead
        a.record()
        before = time.perf_counter()
        f()
        host = time.perf_counter() - before
        b.record()
        torch.cuda.synchronize()
        times.append((a.elapsed_time(b), 1e3 * host))
    return [sorted(column)[len(times[2:]) // 2] for column in zip(*times[2:])]


def launches(f):
    "How many kernels, fills and copies a call starts."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        f()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())


def copy_bandwidth():
    "Bytes a second, read and written, of a copy of 2 GiB."
    x, y = torch.empty(2, 2**31, dtype=torch.uint8, device=DEVICE)
    return 2 * x.numel() / milliseconds(lambda: y.copy_(x))[0] * 1e3


def measure(name, bandwidth):
    "One row, as a dictionary."
    task, shape, _, who = name.split("/")
    f, *_ = task_of(name)
    with torch.set_grad_enabled(task == "training"):
        start = time.perf_counter()
        f()
        torch.cuda.synchronize()
        result = {"first_s": time.perf_counter() - start, "error": error(name)}
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f()
        result |= {"MiB": (torch.cuda.max_memory_allocated() - before) / 2**20, "launches": launches(f)}
        result["ms"], result["host"] = milliseconds(f)
    if task == "decode":
        least = 32 * int(shape) * (2 * 4 * D * D + 4 * 2 * D + 4 * D + 4)        # the state twice, inputs and outputs
        result["copy"] = least / (result["ms"] * 1e-3) / bandwidth
    elif who != "attention":
        result["floor"] = math.prod(SHAPES[shape]) * LEAST[task] / bandwidth * 1e3 / result["ms"]
    return result


# ---- reporting

def of_package(name):
    try: return version(name)
    except PackageNotFoundError: return None


def machine(bandwidth):
    names = ("torch", "triton", "fla-core", "flash-linear-attention")
    return dict(device=torch.cuda.get_device_name(), date=str(date.today()), versions={n: of_package(n) for n in names},
                cuda=torch.version.cuda, copy_bandwidth=bandwidth)


def table(found):
    "The rows as text; “× fla” is the reference library's time over this row's."
    lines = [f"{found['device']}, {found['date']}, {found['versions']}, copies at {found['copy_bandwidth'] / 1e12:.2f} TB/s",
             f"{'':34}" + "".join(f"{name:>9}" for name in (*COLUMNS, "× fla"))]
    for name, row in found["rows"].items():
        peer = found["rows"].get(name.rsplit("/", 1)[0] + "/fla")
        cells = [form.format(row[key]) if key in row else " " * 9 for key, form in COLUMNS.items()]
        if "failed" in row: cells = ["  " + row["failed"]]
        elif peer and "ms" in peer: cells.append(f"{peer['ms'] / row['ms']:9.2f}")
        lines.append(f"{name:34}" + "".join(cells))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="measure the reference library as well")
    parser.add_argument("--only", default="", help="rows whose name contains this, such as forward/A or kda_lit")
    parser.add_argument("--minutes", type=float, default=30, help="no row is started after that")
    parser.add_argument("--cold", action="store_true", help="start with an empty compilation cache; see first_s")
    parser.add_argument("--out", type=Path, default=Path("build/h200.json"), help="where results go, after each row")
    parser.add_argument("--table", type=Path, metavar="JSON", help="only print the results in this file")
    args = parser.parse_args()
    if args.table: return print(table(json.loads(args.table.read_text())))
    if not torch.cuda.is_available(): parser.error("this needs an NVIDIA GPU; benchmarks/cpu.py does not")
    if args.cold: os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    start, bandwidth = time.perf_counter(), copy_bandwidth()
    found, bar = machine(bandwidth) | {"rows": {}}, tqdm([name for name in rows(args.peer) if args.only in name])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in bar:
        if time.perf_counter() - start > 60 * args.minutes: break
        bar.set_description(name)
        torch.manual_seed(0)
        try: found["rows"][name] = measure(name, bandwidth)
        except torch.OutOfMemoryError: found["rows"][name] = {"failed": "out of memory"}
        torch.cuda.empty_cache()
        args.out.write_text(json.dumps(found, indent=1))
        tqdm.write(table(found | {"rows": {name: found["rows"][name]}}).splitlines()[-1])
    print(table(found))


if __name__ == "__main__":
    main()
