"""Which files differ between two folders? Contents only: no git, no time stamps."""
from pathlib import Path


def contents(folder, pattern="**/*"):
    "`{relative path: bytes}`"
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(Path(folder).glob(pattern)) if f.is_file()}


def differences(new, old, pattern="**/*"):
    "One line for each file of `old` that is not what `new` has."
    new, old = contents(new, pattern), contents(old, pattern)
    why = lambda f: "missing" if f not in old else "made by nothing: delete it" if f not in new else "differs"
    return [f"{f} ({why(f)})" for f in sorted(new.keys() | old.keys()) if new.get(f) != old.get(f)]
