"""How fast is `chunk_kda` on a processor, and how much memory does it take?

    python benchmarks/cpu.py                     # 2 threads, B=1 T=2048 H=8 K=V=128, float32

Beside it stand the reference library's two plain PyTorch versions, if that library can be
imported. It wants a place of its own, so that it never meets this project's environment:

    pip install --no-deps --target build/reference fla-core==0.6.0 triton einops
    PYTHONPATH=build/reference python benchmarks/cpu.py

Without it, this project's own plain versions (05_naive) stand in, and the table says so. The
recurrence that autograd goes through is this project's in any case: the reference library's
writes all outputs into one tensor, which autograd copies at every token.

Every row is measured in a process of its own. Memory is the highest resident set of that
process (ru_maxrss) during the first run, less what it was before: inputs are not counted,
outputs and everything in between are.
"""
import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time

from tqdm import tqdm

# This process imports no torch: a child's ru_maxrss starts from its parent's size.

ROWS = {  # name in the table → (module, function, with gradients)
    "chunk_kda": ("kda_lit.chunk", "chunk_kda", False),
    "naive chunks": ("naive", "naive_chunk_kda", False),
    "naive recurrence": ("naive", "naive_recurrent_kda", False),
    "chunk_kda, forward + backward": ("kda_lit.chunk", "chunk_kda", True),
    "autograd through the same chunks": (__name__, "chunks_by_autograd", True),
    "autograd through the recurrence": ("kda_lit.naive", "naive_recurrent_kda", True),
}
GOALS = {  # times slower than chunk_kda for the same task, at least
    "naive chunks": 3.0, "naive recurrence": 1.5,
    "autograd through the same chunks": 1.0, "autograd through the recurrence": 3.0,
}
GOAL_MEMORY = 1024  # MiB, of chunk_kda's forward pass
ENOUGH = 10  # seconds a row, then two runs have to do
GOAL_SAVED = 2.0  # times the memory of forward + backward that autograd takes through the same chunks


def naive_module():
    "Where the plain versions come from: the reference library, or kda_lit."
    found = importlib.util.find_spec("fla") is not None
    return "fla.ops.kda.naive" if found else "kda_lit.naive"


def chunks_by_autograd(q, k, v, g, beta):
    "chunk_kda's forward pass, differentiated by autograd and not by hand."
    from kda_lit.chunk import cut_inputs, first_chunks, forward_chunks
    chunks = cut_inputs(q, k, v, g, beta, None, 64)
    S = v.new_zeros(len(v), v.shape[2], k.shape[3], v.shape[3])
    forward = forward_chunks(*chunks, k.shape[3] ** -0.5, S, first_chunks(None, *v.shape[:2], 64))
    o = forward.o.transpose(1, 2).reshape(len(v), -1, *v.shape[2:])
    return o[:, :v.shape[1]], forward.S


def draw(B, T, H, K, V):
    "Unit queries and keys, log-decays in (-1, 0), write strengths in (0, 1)."
    import torch
    torch.manual_seed(0)
    q, k = torch.nn.functional.normalize(torch.randn(2, B, T, H, K), dim=-1)
    v, g = torch.randn(B, T, H, V), -torch.rand(B, T, H, K)
    return q, k, v, g, torch.rand(B, T, H)


def peak():
    "Highest resident set of this process so far, in MiB."
    import resource
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def error(f):
    "Largest difference from the recurrence in float64 on a short input, relative to its largest value."
    from kda_lit.naive import naive_recurrent_kda
    inputs = draw(1, 128, 2, 32, 32)
    want = naive_recurrent_kda(*(x.double() for x in inputs))[0]
    return ((f(*inputs)[0] - want).abs().max() / want.abs().max()).item()


def measure(row, sizes, threads, repeats):
    "Milliseconds (median), MiB and error of one row, in this process."
    import torch
    torch.set_num_threads(threads)
    module, name, gradients = ROWS[row]
    f = getattr(importlib.import_module(naive_module()) if module == "naive" else
                sys.modules.get(module) or importlib.import_module(module), name)
    result = {"error": error(f)}
    inputs = [x.requires_grad_(gradients) for x in draw(*sizes)]

    def run():
        with torch.set_grad_enabled(gradients):
            o, _ = f(*inputs)
            if gradients: torch.autograd.grad(o.sum(), inputs)

    before, times = peak(), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        result.setdefault("MiB", peak() - before)
        if len(times) > 2 and sum(times) > ENOUGH: break
    return result | {"ms": 1e3 * statistics.median(times[1:])}  # the first run warms up


def in_child(row, args):
    "`measure` in a process of its own."
    command = [sys.executable, __file__, "--row", row, "--repeats", str(args.repeats),
               "--threads", str(args.threads), "--sizes", *map(str, args.sizes)]
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(results):
    "The rows as text; “× time” is a row's time over chunk_kda's time for the same task."
    lines = [f"{'':34}{'ms':>8}{'× time':>9}{'goal':>9}{'peak MiB':>10}{'error':>10}"]
    for row, r in results.items():
        goal = f"≥ {GOALS[row]}" if row in GOALS else ""
        lines.append(f"{row:34}{r['ms']:8.0f}{r['ms'] / results[base(row)]['ms']:9.2f}{goal:>9}"
                     f"{r['MiB']:10.0f}{r['error']:10.0e}")
    return "\n".join(lines)


def base(row):
    "The row that `row` is compared with: chunk_kda at the same task."
    return "chunk_kda, forward + backward" if ROWS[row][2] else "chunk_kda"


def missed(results):
    "The goals that were not met, in words."
    ratio = {row: results[row]["ms"] / results[base(row)]["ms"] for row in GOALS}
    late = [f"{row} is only {ratio[row]:.2f} times slower than chunk_kda" for row, goal in GOALS.items()
            if ratio[row] < goal]
    fat = results["chunk_kda"]["MiB"] >= GOAL_MEMORY
    saved = results["autograd through the same chunks"]["MiB"] / results["chunk_kda, forward + backward"]["MiB"]
    return (late + fat * [f"chunk_kda takes {GOAL_MEMORY} MiB or more"]
            + (saved < GOAL_SAVED) * [f"autograd takes only {saved:.1f} times the memory"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs=5, metavar=tuple("BTHKV"),
                        default=[1, 2048, 8, 128, 128])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7, help="runs of which the median is taken")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        return print(json.dumps(measure(args.row, args.sizes, args.threads, args.repeats)))
    B, T, H, K, V = args.sizes
    print(f"B={B} T={T} H={H} K={K} V={V}, float32, {args.threads} threads; median of {args.repeats}")
    print("naive: " + ("the reference library's" if naive_module().startswith("fla") else
                       "this project's own 05_naive (the reference library is not installed)"))
    results = {row: in_child(row, args) for row in tqdm(ROWS, desc="rows", disable=None)}
    print(table(results))
    for goal in missed(results): print("missed:", goal)


if __name__ == "__main__":
    main()
