"""Fail unless the package is what the notebooks export, and the notebooks are clean.

Export and clean run on a scratch copy, so nothing of yours is touched and nothing needs to be committed.
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from comparing import differences

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def export(folder):
    "What `make export` would leave, in `folder`; of the package only the hand-written `__init__.py` is copied."
    for name in ("settings.ini", "pyproject.toml", "kda_lit/__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "nbs").mkdir()
    for notebook in (ROOT / "nbs").glob("*.ipynb"): shutil.copy2(notebook, folder / "nbs")
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([BIN / command], cwd=folder, check=True, stdin=subprocess.DEVNULL)


def main():
    with tempfile.TemporaryDirectory(prefix="kda_lit_export_") as folder:
        export(Path(folder))
        stale = [f"{part}/{line}" for part, pattern in (("kda_lit", "*.py"), ("nbs", "*.ipynb"))
                 for line in differences(Path(folder) / part, ROOT / part, pattern)]
        if differences(folder, ROOT, "pyproject.toml"): stale.append("pyproject.toml")
    if stale: sys.exit("out of date (`make export` mends it):\n  " + "\n  ".join(stale))
    print("      export and clean leave no difference")


if __name__ == "__main__":
    main()
