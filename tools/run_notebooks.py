"""Run notebooks in place and store their outputs.

    python tools/run_notebooks.py                         # all of them
    python tools/run_notebooks.py nbs/05_naive.ipynb      # these
    python tools/run_notebooks.py --flags cuda            # on a GPU machine: also the `#| cuda` cells

nbdev_test throws outputs away. This keeps them: each notebook runs in its own process, figures are stored as SVG
whose bytes depend on the figure alone, and cells that are skipped (`#| eval: false`, or a flag of `tst_flags` in
settings.ini) keep the outputs they already have, so pictures from a GPU survive a run on a laptop.
"""
import argparse
import multiprocessing as mp
import os
import sys
from pathlib import Path

from tqdm import tqdm


def skipped(cell, flags):
    "Whether `cell` stays as it is; a cell that will run loses its old outputs here."
    from nbdev.process import extract_directives
    if cell.cell_type != "code": return True
    options = extract_directives(cell, remove=False)
    if flags & options.keys() or options.get("eval:", [""])[0].lower() == "false": return True
    cell.outputs = []
    return False


def run_one(path, flags):
    "Execute, clean and write back one notebook; exit with 1 and a traceback if a cell raises."
    os.environ["IN_TEST"] = "1"             # nbdev_export() in the last cell does nothing
    os.environ["SOURCE_DATE_EPOCH"] = "0"   # no date in a figure
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb

    nb = read_nb(path)
    os.chdir(path.parent)                   # as nbdev_test and Jupyter do
    shell = CaptureShell(path, mpl_format="svg")
    shell.run("import matplotlib as _mpl; _mpl.rcParams['svg.hashsalt'] = 'kda_lit'; del _mpl")
    try: shell.run_all(nb, exc_stop=True, preproc=lambda cell: skipped(cell, flags))
    except BaseException:
        sys.stderr.write(shell.prettytb(path) + "\n")
        sys.exit(1)
    clean_nb(nb)
    write_nb(nb, path)


def main():
    from nbdev.config import get_config
    from nbdev.doclinks import nbglob
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of nbs/")
    parser.add_argument("--flags", default="", help="flags of tst_flags whose cells shall run as well")
    args = parser.parse_args()
    flags = set(get_config().tst_flags.split()) - set(args.flags.split())
    paths = args.notebooks or sorted(map(Path, nbglob()))

    failed, bar = [], tqdm(paths, unit="notebook")
    for path in bar:
        bar.set_postfix_str(path.stem)
        process = mp.get_context("spawn").Process(target=run_one, args=(path.resolve(), flags))
        process.start()
        process.join()
        if process.exitcode: failed.append(path.name)
    if failed: sys.exit(f"failed: {' '.join(failed)}")


if __name__ == "__main__":
    main()
