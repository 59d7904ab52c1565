"""Compile every kernel for a GPU that need not be there, and print what it costs.

    python tools/compile_kernels.py                 # for an H100 or H200
    python tools/compile_kernels.py --capability 80 # for an A100

The interpreter takes what the compiler refuses, so this is the second half of a test without a GPU. The launches are those
of tests/test_equations*.py; of launches that differ in sizes only, the one with the largest blocks is compiled. Those of
tests/test_fused*.py are compiled in all sizes, and for half precision, in which fused kernels are used. It fails if a kernel
reads a uniform register that nothing has written, which is the assembler's fault (41_fused_backward tells of it).
"""
import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FUSED = {"prepare_kernel", "walk_kernel", "replay_kernel", "walk_back_kernel", "gradients_kernel"}
SINGLE = {"A", "BIAS", "DECAY", "SCALARS", "STATE", "DSTATE", "DA"}       # in float32 there, too
POINTERS = {"float32": "*fp32", "int8": "*i8", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32", "int64": "*i64"}


def type_of(x):
    "A launch argument as Triton's compiler wants to know it; an absent tensor is compiled in."
    if x is None: return "constexpr"
    if hasattr(x, "dtype"): return POINTERS[str(x.dtype).removeprefix("torch.")]
    return {bool: "i1", int: "i32", float: "fp32"}[type(x)]


class Recorder:
    "A pytest plugin that writes down launches while the tests run."
    def __init__(self): self.launches = {}

    def pytest_collection_finish(self):
        import kda_lit.kernels as kernels
        launch = kernels.launch

        def recorded(kernel, programs, *args, **constants):
            sizes = {k: v for k, v in constants.items() if type(v) is int}
            flags = {k: v for k, v in constants.items() if type(v) is not int}
            key = kernel.__name__, str([type_of(x) for x in args]), str(flags), str(sizes if kernel.__name__ in FUSED else "")
            if key not in self.launches or math.prod(sizes.values()) > math.prod(self.launches[key][1].values()):
                self.launches[key] = [type_of(x) for x in args], sizes, flags
            return launch(kernel, programs, *args, **constants)
        kernels.launch = recorded


def record():
    "Run the tests in the interpreter; JSON of all launches to standard output."
    import pytest
    recorder, output = Recorder(), os.dup(1)
    os.dup2(2, 1)                                                        # what pytest prints
    files = [str(path) for name in ("equations", "fused") for path in (ROOT / "tests").glob(f"test_{name}*.py")]
    failed = pytest.main([*files, "-q", "-k", "triton or fused and not compiler"], plugins=[recorder])
    os.write(output, json.dumps([(key[0], *launch) for key, launch in recorder.launches.items()]).encode())
    sys.exit(failed)


def unwritten(instructions):
    "Uniform registers that are read, in the order of the code, before anything has written them."
    written, found = set(), set()
    for text in instructions:
        op, _, rest = re.sub(r"^@!?U?P\w+ +", "", text).partition(" ")
        target = re.match(r"(?:UP\w, )*UR(\d+)\b", rest) if op.startswith(("U", "R2UR", "S2UR")) else None
        pair = {0, 1} if op.startswith("U") and ".64" in op else {0}
        for m in re.finditer(r"(g?desc\[)?\bUR(\d+)\b", rest[target.end():] if target else rest):
            wide = {None: pair, "desc[": {0, 1}, "gdesc[": {2, 3} if re.search(r", R\d+, gdesc", rest) else {0, 1, 2, 3}}[m[1]]
            found |= {int(m[2]) + i for i in wide} - written
        if target: written |= {int(target[1]) + i for i in (pair | {1} if ".WIDE" in op else pair)}
    return sorted(found)


def usage(compiled):
    "Registers, bytes on the stack (spills), bytes of shared memory, and uniform registers that nothing has written."
    import triton
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said, code = (subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout for flag in ("-res-usage", "-sass"))
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?) ?;", code, re.M)
    return *map(int, re.search(r"REG:(\d+) STACK:(\d+)", said).groups()), compiled.metadata.shared, unwritten(instructions)


def compile_one(name, types, constants, capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import kda_lit.kernels as kernels
    kernel = getattr(kernels, name)
    rows = [rows.get(name, {}) for since, rows in sorted(kernels.OPTIONS.items()) if since <= capability]
    found = {key: n for row in rows for key, n in row.items()}
    found |= constants
    constants = {key: found.pop(key) for key in list(found) if key in kernel.arg_names}
    names = [n for n in kernel.arg_names if n not in constants]
    if name in FUSED: types = ["*bf16" if t == "*fp32" and n not in SINGLE else t for n, t in zip(names, types)]
    signature = {**dict(zip(names, types, strict=True)), **dict.fromkeys(constants, "constexpr")}
    constants |= {n: None for n in names if signature[n] == "constexpr"}
    aligned = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in names if signature[n].startswith("*")}
    source = ASTSource(kernel, {n: signature[n] for n in kernel.arg_names},
                       {(kernel.arg_names.index(n),): x for n, x in constants.items()}, aligned)
    return usage(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=found))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="compute capability, 10 · major + minor")
    parser.add_argument("--record", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if args.record: record()
    env = os.environ | {"TRITON_INTERPRET": "1"}
    launches = json.loads(subprocess.run([sys.executable, __file__, "--record"], env=env, check=True, stdout=subprocess.PIPE).stdout)
    os.environ["TRITON_INTERPRET"] = "0"
    print(f"{'kernel':28}{'constants':44}registers  stack  shared")
    wrong = []
    for name, types, sizes, flags in launches:
        registers, stack, shared, stale = compile_one(name, types, sizes | flags, args.capability)
        print(f"{name:28}{' '.join(f'{k}={v}' for k, v in (sizes | flags).items()):44}{registers:9}{stack:7}{shared:8}")
        if stale: wrong.append(f"{name} {sizes | flags} reads uniform registers that nothing has written: {stale}")
    if wrong: sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
