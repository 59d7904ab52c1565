"""How fast is KDA on a GPU: this library, the reference library, and PyTorch's causal attention, in one process.

    python benchmarks/h200.py                          # kda_lit and attention
    python benchmarks/h200.py --peer                   # and the reference library
    python benchmarks/h200.py --peer --cold            # first calls, each in a fresh process with an empty cache
    python benchmarks/h200.py --only forward/A --minutes 5
    python benchmarks/h200.py --table benchmarks/results/h200.json   # print what earlier runs have written

The reference library wants a place of its own, so that it never meets this project's environment:

    pip install --no-deps --target build/reference fla-core==0.6.0 flash-linear-attention==0.6.0 einops
    PYTHONPATH=build/reference python benchmarks/h200.py --peer

A row is task/shape/gate/who. Of each: `ms`, the median by CUDA events, with the L2 cache flushed before each run (inputs are larger
than it in any case); where a token is decoded, of replays of a CUDA graph whose calls take turns at enough states to exceed that cache.
`host`, the milliseconds that the processor needs for a call: where they exceed those of the GPU, a model waits for them, unless it
replays a graph. `launches`, kernels, fills and copies. `MiB`, the peak above what was there before the call. `floor`, the share of
the time that reading inputs and writing outputs once would take at the bandwidth of a copy; `copy`, that same share where
tokens are decoded. `error`, of the very configuration that is timed: on fewer tokens, in the norm, the worst of all that is
returned, against the recurrence in float64; on fresh inputs, 16 draws, and on hard ones, 4 of each, the same for both libraries.
`first_s` (--cold), the seconds of a first call, compilation and search for launch options included.

128 channels, bfloat16, raw gates as a layer is initialised with. The reference library searches its launch options at
the first call of each shape; precompile.py shortens the compilation that goes with it, never the search: `tuning` says
what it took. Results are added to those in --out: each row names its run, and rows of different runs are
never compared, since the next machine may be another.
"""
import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = "1"         # its own kernels, not those of others that it finds

import torch
import torch.nn.functional as F
from tqdm import tqdm

DEVICE, D = "cuda", 128
SHAPES = {"A": (1, 8192, 64), "C": (8, 2048, 32), "B": (1, 32768, 32)}      # B, T, H
BOUNDS = {"bounded": -5.0, "softplus": None}
DECODED = (1, 4, 16, 64, 256)                            # sequences of 32 heads, a token each
INPUTS = ("fresh", "duplicate keys", "spikes", "no decay")                  # what errors are measured on
DRAWS = {"fresh": 16}                                    # or 4: a gate's gradients are few numbers, sums that cancel more or less by chance
LEAST = {"forward": 2 * (5 * D + 1), "training": 2 * (14 * D + 3)}          # bytes a token and head
FLAGS = dict(use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True)
COLUMNS = {"ms": "{:9.4f}", "host": "{:9.3f}", "first_s": "{:9.1f}", "launches": "{:9d}", "MiB": "{:9.0f}", "floor": "{:9.1%}",
           "copy": "{:9.1%}"}


def rows(peer, cold=False):
    "Names of everything to measure: task/shape/gate/who."
    libraries = ("kda_lit", "fla") if peer else ("kda_lit",)
    if cold: return [f"first {task}/A/bounded/{who}" for who in libraries for task in LEAST]
    names = []
    for shape in SHAPES:
        for task in LEAST:
            names += [f"{task}/{shape}/{gate}/{who}" for gate in BOUNDS for who in libraries]
            names += [f"{task}/{shape}/-/attention"]
        if shape == "A": names += [f"decode/{n}/-/{who}" for n in DECODED for who in libraries]
    return names


# ---- inputs

def layer(B, T, H):
    "Inputs of a layer, and the parameters of its gate as they are initialised."
    new = lambda *size: torch.randn(size, device=DEVICE).bfloat16()
    step = torch.empty(H * D, device=DEVICE).uniform_(math.log(1e-3), math.log(0.1)).exp()
    gates = dict(A_log=torch.empty(H, device=DEVICE).uniform_(1, 16).log(), dt_bias=step + torch.log(-torch.expm1(-step)))
    return dict(q=new(B, T, H, D), k=new(B, T, H, D), v=new(B, T, H, D), g=0.1 * new(B, T, H, D), beta=new(B, T, H)), gates


def harder(kind, x, gates):
    "The same, changed in place into what is known to be hard; raw gates of ±50 are decays of -50 (or the bound) and of 0."
    if kind == "fresh": return
    x["beta"].fill_(30)                                  # a write strength of 1
    if kind == "duplicate keys": x["k"] = x["k"][:, :1] + 0.01 * x["k"]
    if kind == "spikes":
        gates["A_log"].zero_()
        x["g"][torch.rand_like(x["g"], dtype=torch.float32) < 0.05] = 50
    if kind == "no decay": x["g"].fill_(-100)


def one_token(N, H=32):
    "What decoding a token takes: log-decays, strengths and states."
    x, _ = layer(N, 1, H)
    g, beta = -0.1 * torch.rand_like(x["g"], dtype=torch.float32), x["beta"].float().sigmoid()
    return x | dict(g=g, beta=beta, initial_state=torch.randn(N, H, D, D, device=DEVICE))


def inputs(task, shape, kind=None, seed=0):
    "Tensors and parameters of a row, for timing, or, with a kind of inputs, small enough for an exact result."
    torch.manual_seed(seed)
    if task == "decode": return one_token(int(shape) if kind is None else min(int(shape), 4)), {}
    B, T, H = SHAPES[shape]
    x, gates = layer(B, T, H) if kind is None else layer(min(B, 2), 200, H)  # H as timed: launch options depend on it
    harder(kind or "fresh", x, gates)
    return x, gates


# ---- what is called

def library(who):
    "chunk_kda and fused_recurrent_kda."
    if who == "fla":
        from fla.ops.kda import chunk_kda, fused_recurrent_kda
        return chunk_kda, fused_recurrent_kda
    from kda_lit import chunk_kda, fused_recurrent_kda
    return chunk_kda, fused_recurrent_kda


def with_gradients(f, leaves):
    "A function that calls f and takes the gradients of a random sum of its outputs."
    do = []

    def run():
        o = f()
        if not do: do.append(torch.randn(o.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)).to(o.dtype))
        return o, *torch.autograd.grad(o, leaves, do[0])
    return run


def call_of(task, gate, who, x, gates):
    "The function to time."
    if task == "decode":
        f = library(who)[1]
        return lambda: f(**x, output_final_state=True, use_qk_l2norm_in_kernel=True)
    if who == "attention":
        x, gates = {key: x[key].transpose(1, 2).contiguous() for key in "qkv"}, {}
        f = lambda: F.scaled_dot_product_attention(*x.values(), is_causal=True)
    else:
        options = gates | dict(lower_bound=BOUNDS[gate], safe_gate=BOUNDS[gate] is not None)
        f = lambda call=library(who)[0]: call(**x, **FLAGS, **options)[0]
    if task == "forward": return f
    return with_gradients(f, [t.requires_grad_() for t in (*x.values(), *gates.values())])


# ---- errors

@lru_cache(maxsize=64)
@torch.enable_grad()
def exact(task, shape, gate, kind, seed):
    "What both libraries should return, by the recurrence in float64."
    from kda_lit import naive_recurrent_kda
    x, gates = inputs(task, shape, kind, seed)
    leaves = {key: t.double().requires_grad_() for key, t in (x | gates).items()}
    y = {key: leaves[key] for key in x}
    y["q"], y["k"] = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (y["q"], y["k"]))
    if task == "decode": return [t.detach() for t in naive_recurrent_kda(**y, output_final_state=True)]
    rate, z, bound = leaves["A_log"].exp()[:, None], y["g"] + leaves["dt_bias"].view(y["g"].shape[2:]), BOUNDS[gate]
    y["g"] = -rate * F.softplus(z, threshold=60) if bound is None else bound * torch.sigmoid(rate * z)
    y["beta"] = y["beta"].sigmoid()
    return [t.detach() for t in with_gradients(lambda: naive_recurrent_kda(**y)[0], [*leaves.values()])()]


def error(task, shape, gate, who, kind, seed):
    "The largest error among all that is returned, each relative to its norm (or to 1e-6 an entry, where it is all but zero)."
    squares = []
    for draw in range(seed, seed + DRAWS.get(kind, 4)):
        got = call_of(task, gate, who, *inputs(task, shape, kind, draw))()
        got = [got] if task == "forward" else got
        want = exact("training" if task == "forward" else task, shape, gate, kind, draw)[:len(got)]
        squares.append([((a.double() - b).square().sum().item(), max(b.square().sum().item(), 1e-12 * b.numel()))
                        for a, b in zip(got, want, strict=True)])
    worst = [math.sqrt(sum(off) / sum(size)) for off, size in (zip(*draws) for draws in zip(*squares))]
    return max(worst) if all(map(math.isfinite, worst)) else math.inf


def errors(task, shape, gate, who, seed):
    kinds = INPUTS[:1] if task == "decode" else INPUTS
    return {kind: error(task, shape, gate, who, kind, seed) for kind in kinds}


# ---- measuring

def milliseconds(f, seconds=2, most=50):
    "Medians of the GPU's time and of the host's, of as many runs as fit into some seconds, at least 5."
    flush, times, ahead, start = torch.empty(2**31, dtype=torch.uint8, device=DEVICE), [], 1, time.perf_counter()
    while len(times) < 7 or (len(times) < most and time.perf_counter() - start < seconds):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(ahead): flush.zero_()             # half a millisecond each
        a.record()
        before = time.perf_counter()
        f()
        host = time.perf_counter() - before
        b.record()
        torch.cuda.synchronize()
        times.append((a.elapsed_time(b), 1e3 * host))
        ahead = min(1 + math.ceil(4e3 * host), 400)      # twice what the host needs: else it is the host that is timed
    return [sorted(column)[len(times[2:]) // 2] for column in zip(*times[2:])]


def replayed(calls, times=30):
    "Median milliseconds of a call, all of them captured in one CUDA graph. What they return is kept, or memory would be reused."
    graph, kept, taken = torch.cuda.CUDAGraph(), [], []
    with torch.cuda.graph(graph): kept += [f() for f in calls]
    for _ in range(times + 2):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        graph.replay()
        b.record()
        torch.cuda.synchronize()
        taken.append(a.elapsed_time(b) / len(calls))
    return sorted(taken[2:])[times // 2]


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


def warm(f, shape, who):
    "The first call. Of the reference library: what its search took, which each shape has for itself."
    start, result = time.perf_counter(), {}
    if who == "fla":
        from precompile import precompile, tune_for
        tune_for(shape)
        result = precompile(f)
    f()
    torch.cuda.synchronize()
    return {"tuning": result | {"seconds": time.perf_counter() - start}} if result else {}


def measure(name, bandwidth, seed):
    "One row, as a dictionary."
    task, shape, gate, who = name.split("/")
    f = call_of(task, gate, who, *inputs(task, shape))
    with torch.set_grad_enabled(task == "training"):
        result = warm(f, shape, who)
        if who != "attention": result["error"] = errors(task, shape, gate, who, seed)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f()
        result |= {"MiB": (torch.cuda.max_memory_allocated() - before) / 2**20, "launches": launches(f)}
        result["ms"], result["host"] = milliseconds(f)
        if task == "decode":
            result["eager_ms"] = result["ms"]
            result["ms"] = replayed([call_of(task, gate, who, *inputs(task, shape, seed=i)) for i in range(max(16, 64 // int(shape)))])
    if task == "decode":
        least = 32 * int(shape) * (2 * 4 * D * D + 4 * 2 * D + 4 * D + 4)        # the state twice, inputs and outputs
        result["copy"] = least / (result["ms"] * 1e-3) / bandwidth
    elif who != "attention":
        result["floor"] = math.prod(SHAPES[shape]) * LEAST[task] / bandwidth * 1e3 / result["ms"]
    return result


def first_call(name):
    "Seconds of the first call in this process."
    task, shape, gate, who = name.split("/")
    task = task.removeprefix("first ")
    f = call_of(task, gate, who, *inputs(task, shape))
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.set_grad_enabled(task == "training"): f()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_first(name, limit):
    "The row of a first call: in a process of its own with an empty cache, which is ended after `limit` seconds."
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--first", name]
        try: out = subprocess.run(command, env=os.environ | {"TRITON_CACHE_DIR": cache}, timeout=limit, capture_output=True, text=True)
        except subprocess.TimeoutExpired: return {"longer_than_s": limit}
    if out.returncode: return {"failed": out.stderr.strip().splitlines()[-1]}
    return {"first_s": float(out.stdout.split()[-1])}


# ---- reporting

def of_package(name):
    try: return version(name)
    except PackageNotFoundError: return None


def machine(bandwidth, seed):
    names = ("torch", "triton", "fla-core", "flash-linear-attention")
    return dict(device=torch.cuda.get_device_name(), versions={n: of_package(n) for n in names}, cuda=torch.version.cuda,
                copy_bandwidth=bandwidth, seed=seed)


def peer_of(name, found, who="fla"):
    "The reference library's row of the same run, or None."
    row, peer = found["rows"][name], found["rows"].get(name.rsplit("/", 1)[0] + "/" + who)
    return peer if peer and peer["run"] == row["run"] else None


def line(name, found):
    "A row as text; “× fla” is the reference library's time over this row's."
    row, peer = found["rows"][name], peer_of(name, found) or {}
    cells = [form.format(row[key]) if key in row else " " * 9 for key, form in COLUMNS.items()]
    worst = max(row.get("error", {"": 0}).values())
    cells += [f"{row['error']['fresh']:9.1e}{worst:9.1e}" if "error" in row else " " * 18]
    cells += [f"{peer[key] / row[key]:9.2f}" for key in ("ms", "first_s") if key in row and key in peer]
    if "longer_than_s" in row: cells = [f"  longer than {row['longer_than_s']:.0f} s"]
    if "failed" in row: cells = ["  " + row["failed"]]
    return f"{name:34}" + "".join(cells)


def table(found):
    "All rows as text, run by run."
    lines = []
    for run, about in found["runs"].items():
        lines += [f"{run}: {about['device']}, {about['versions']}, copies at {about['copy_bandwidth'] / 1e12:.2f} TB/s",
                  f"{'':34}" + "".join(f"{name:>9}" for name in (*COLUMNS, "error", "hard", "× fla"))]
        lines += [line(name, found) for name, row in found["rows"].items() if row["run"] == run]
    return "\n".join(lines)


def merged(old, run, about, new):
    "Earlier results, with those of a run added; what it measured again is replaced, and runs that no row names are left out."
    found = {"runs": old.get("runs", {}) | {run: about}, "rows": old.get("rows", {}) | {n: {"run": run} | row for n, row in new.items()}}
    named = {row["run"] for row in found["rows"].values()}
    return found | {"runs": {run: about for run, about in found["runs"].items() if run in named}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="measure the reference library as well")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of these, such as forward/A or kda_lit")
    parser.add_argument("--minutes", type=float, default=30, help="no row is started after that")
    parser.add_argument("--cold", action="store_true", help="measure first calls instead of warm ones")
    parser.add_argument("--limit", type=float, default=120, help="seconds after which a first call is given up")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the inputs that errors are measured on")
    parser.add_argument("--out", type=Path, default=Path("build/h200.json"), help="where results are added, after each row")
    parser.add_argument("--table", type=Path, metavar="JSON", help="only print the results in this file")
    parser.add_argument("--first", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table: return print(table(json.loads(args.table.read_text())))
    if not torch.cuda.is_available(): parser.error("this needs an NVIDIA GPU; benchmarks/cpu.py does not")
    if args.first: return print(first_call(args.first))
    if args.peer:
        from precompile import tune_separately
        tune_separately()                                # before the library makes its autotuners
    start, bandwidth, new = time.perf_counter(), copy_bandwidth(), {}
    torch.cuda.empty_cache()
    old = json.loads(args.out.read_text()) if args.out.exists() else {}
    run, about = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}", machine(bandwidth, args.seed)
    bar = tqdm([name for name in rows(args.peer, args.cold) if any(part in name for part in args.only)])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in bar:
        if time.perf_counter() - start > 60 * args.minutes: break
        bar.set_description(name)
        try: new[name] = measure_first(name, args.limit) if args.cold else measure(name, bandwidth, args.seed)
        except Exception as e: new[name] = {"failed": f"{type(e).__name__}: {e}"[:200]}
        torch.cuda.empty_cache()
        found = merged(old, run, about, new)
        args.out.write_text(json.dumps(found, indent=1))
        tqdm.write(line(name, found))
    if new: print(table(found))


if __name__ == "__main__":
    main()
