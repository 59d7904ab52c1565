"""Build the site in docs/, and README.md, from the notebooks.

    python tools/build_docs.py            # write docs/ and README.md
    python tools/build_docs.py --check    # write nothing: fail unless docs/ and README.md are what would be written

`lowering` turns each notebook, with its stored outputs, into MyST; Sphinx renders it. A warning (a broken link, an
unknown name) is an error. The same notebooks give the same bytes, and no page loads anything from the network.
"""
import argparse
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

import yaml

from comparing import differences
from lowering import Book, Page, link_pages, lower, outside_code, slug

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "tools" / "site"
DOCS_PYTHON = (3, 11)   # from here on constraints.txt pins one and the same version of every tool that writes HTML


def settings():
    ini = ConfigParser(delimiters=["="], interpolation=None)
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


# README --------------------------------------------------------------------------------------------------------------

def figure(outputs):
    "`(file ending, bytes)` of the first picture among the outputs of a cell, or None."
    for data in (out.get("data", {}) for out in outputs):
        if "image/svg+xml" in data: return "svg", "".join(data["image/svg+xml"]).encode()
        if "image/png" in data: return "png", base64.b64decode("".join(data["image/png"]))


def printed(outputs):
    "The text that a cell printed or returned."
    texts = [out.get("text") or out.get("data", {}).get("text/plain", "") for out in outputs
             if out.get("name") != "stderr" and "image/svg+xml" not in out.get("data", {})]
    return "".join("".join(text) for text in texts).rstrip()


def readme(page, book, docs):
    "README.md as text, for GitHub: notebooks are linked as such, and figures are stored beside the pages."
    links = lambda text: link_pages(text, book, lambda name: f"nbs/{name}")
    parts = ["<!-- Generated from nbs/index.ipynb by tools/build_docs.py -->",
             f"# {page.title}", f"> {page.question}"]
    for cell in page.cells:
        if cell.hidden or not cell.source: continue
        if cell.kind == "markdown":
            parts.append(outside_code(links, cell.source))
            continue
        if not cell.off("echo"): parts.append(f"```python\n{cell.source}\n```")
        if text := printed(cell.outputs): parts.append(f"```text\n{text}\n```")
        if picture := figure(cell.outputs):
            file = Path("_images") / f"readme-{len(parts)}.{picture[0]}"
            (docs / file).write_bytes(picture[1])
            parts.append(f"![{cell.options.get('fig-alt', '')}](docs/{file.as_posix()})")
    return "\n\n".join(parts) + "\n"


# site ----------------------------------------------------------------------------------------------------------------

def sidebar():
    "`{caption: file names}`, from nbs/sidebar.yml."
    bar = yaml.safe_load((ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]
    return {item["section"]: item["contents"] for item in bar["contents"] if isinstance(item, dict)}


def toctrees(book):
    "The groups of the side bar as hidden tables of contents. A page that it forgets comes last."
    groups = {caption: [name for name in names if name in book.notebooks] for caption, names in sidebar().items()}
    groups["More"] = sorted(book.notebooks - book.planned - {"index.ipynb"})
    entries = {caption: [slug(name) for name in names] for caption, names in groups.items() if names}
    entries["Reference"] = ["All names <genindex>"]
    tree = "```{{toctree}}\n:hidden:\n:caption: {}\n\n{}\n```"
    return "\n\n".join(tree.format(caption, "\n".join(names)) for caption, names in entries.items())


def definitions(pages, lib):
    "`{name as written in prose: qualified name}` of everything that has a reference card."
    full = [name for page in pages for cards in page.cards(lib).values() for name in cards]
    short = {re.sub(rf"^{lib}\.\w+\.", "", name): name for name in reversed(full)}
    return short | {name: name for name in full}


def bind(pages):
    "Settings, pages and side bar as the book that they make."
    cfg = settings()
    planned = {name for names in sidebar().values() for name in names}
    return Book(cfg["lib_name"], definitions(pages, cfg["lib_name"]), {p.path.name for p in pages}, planned,
                set(cfg["tst_flags"].split()))


def copy_mathjax(target):
    "The 2 MB of the `sphinx-mathjax-offline` wheel, of 24 MB, that these pages use."
    source = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    fonts, extensions = source / "output/chtml/fonts/woff-v2", source / "input/tex/extensions"
    files = [source / "tex-chtml.js", *fonts.iterdir(),
             *(f for f in extensions.glob("*.js") if f.name != "all-packages.js")]
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def write_sources(pages, book, work):
    "Fill `work` with what Sphinx reads: the lowered notebooks, conf.py and the static files."
    shutil.copytree(SITE, work)
    copy_mathjax(work / "_static" / "mathjax")
    for page in pages:
        nb = lower(page, book, toctrees(book) if page.slug == "index" else "")
        (work / f"{page.slug}.ipynb").write_text(json.dumps(nb), encoding="utf-8")
    about = {page.slug: [page.path.relative_to(ROOT).as_posix(), page.module] for page in pages}
    (work / "pages.json").write_text(json.dumps(dict(pages=about, names=book.names)), encoding="utf-8")


def render(work, out):
    "Run Sphinx; leave out what readers do not need and what differs between machines."
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", f"{work}-doctrees", work, out]
    env = {**os.environ, "KDA_ROOT": str(ROOT), "PYTHONHASHSEED": "0"}
    env.pop("SOURCE_DATE_EPOCH", None)
    if subprocess.run(command, env=env, stdin=subprocess.DEVNULL).returncode: sys.exit("the site does not build")
    shutil.rmtree(out / "_sources", ignore_errors=True)
    for extra in (out / ".buildinfo", out / "objects.inv", *out.rglob("*.map")): extra.unlink(missing_ok=True)
    (out / ".nojekyll").touch()


def refuse_local_paths(out):
    "A traceback or a warning stored in a notebook can carry the path of the machine it ran on into the site."
    here = [str(ROOT).encode(), str(Path.home()).encode() + b"/", b"site-packages/"]
    texts = (f for f in sorted(out.rglob("*")) if f.suffix in (".html", ".js", ".svg") and "_static" not in f.parts)
    found = [f.relative_to(out).as_posix() for f in texts if any(path in f.read_bytes() for path in here)]
    if found: sys.exit(f"pages with a path of this machine: {' '.join(found)}")


def build(folder):
    "Build docs/ and README.md into `folder`; returns the number of pages."
    pages = [Page.read(path) for path in sorted((ROOT / "nbs").glob("*.ipynb"))]
    book = bind(pages)
    write_sources(pages, book, folder / "source")
    render(folder / "source", folder / "docs")
    refuse_local_paths(folder / "docs")
    index = next(page for page in pages if page.slug == "index")
    (folder / "README.md").write_text(readme(index, book, folder / "docs"), encoding="utf-8")
    return len(pages)


def check(folder):
    "Compare a build with what is in the checkout."
    if sys.version_info < DOCS_PYTHON:
        return print("      not compared with docs/: the tools that wrote it need Python 3.11")
    stale = [f"docs/{f}" for f in differences(folder / "docs", ROOT / "docs")]
    if (ROOT / "README.md").read_bytes() != (folder / "README.md").read_bytes(): stale.append("README.md")
    if stale: sys.exit("out of date (`make docs` mends it):\n  " + "\n  ".join(stale))
    print("      docs/ and README.md are up to date")


def install(folder):
    "Put a build in the place of the old one."
    shutil.rmtree(ROOT / "docs", ignore_errors=True)
    shutil.copytree(folder / "docs", ROOT / "docs")
    shutil.copyfile(folder / "README.md", ROOT / "README.md")
    print("      wrote docs/ and README.md")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on any difference")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kda_lit_site_") as folder:
        count = build(Path(folder))
        print(f"      {count} pages, no warnings")
        (check if args.check else install)(Path(folder))


if __name__ == "__main__":
    main()
