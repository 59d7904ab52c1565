"""From notebooks to pages: nbdev's directives and GitHub's Markdown become MyST, which Sphinx reads.

The notebooks are taken as they stand, with their stored outputs. Nothing is executed.
"""
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from api_cards import cards

DIRECTIVE = re.compile(r"^#\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")
HIDDEN = {"hide", "default_exp", "export", "exporti"}


def slug(name):
    "`10_chunk_intra.ipynb` → `chunk_intra`: the page, as the module, has its notebook's name without the number."
    return re.sub(r"^\d+[a-zA-Z0-9]*_", "", Path(name).stem)


@dataclass
class Cell:
    kind: str
    source: str
    options: dict = field(default_factory=dict)
    outputs: list = field(default_factory=list)

    @classmethod
    def read(cls, raw):
        lines, options = "".join(raw["source"]).strip().splitlines(), {}
        while raw["cell_type"] == "code" and lines and (found := DIRECTIVE.match(lines[0])):
            options[found[1]] = found[2].strip("\"'")
            lines.pop(0)
        return cls(raw["cell_type"], "\n".join(lines).strip(), options, raw.get("outputs", []))

    def off(self, option): return self.options.get(option, "").lower() == "false"

    @property
    def hidden(self): return bool(HIDDEN & self.options.keys()) or self.off("include")

    @property
    def exported(self):
        "Whether it goes to the module of its page; kernels, which go to another one, have no reference card."
        return "" in (self.options.get("export"), self.options.get("exports"))


@dataclass
class Book:
    "What a page has to know of the others."
    lib: str           # name of the package
    names: dict        # name as written in prose → qualified name
    notebooks: set     # file names of all pages
    planned: set       # file names that nbs/sidebar.yml lists, written or not
    flags: set         # directives that mark cells for special machines


@dataclass
class Page:
    "A notebook, read: its first cell says title and question, the others are the page."
    path: Path
    title: str
    question: str
    cells: list
    module: str

    @classmethod
    def read(cls, path):
        raw = json.loads(path.read_text(encoding="utf-8"))["cells"]
        head, *cells = map(Cell.read, raw)
        title = re.search(r"^#\s+(.+)$", head.source, re.M)
        if not title: raise SystemExit(f"{path}: the first cell must be `# Title` and `> one line`")
        question = " ".join(re.findall(r"^>\s*(.+)$", head.source, re.M))
        module = next((c.options["default_exp"] for c in cells if "default_exp" in c.options), "")
        return cls(path, title[1], question, cells, module)

    @property
    def slug(self): return slug(self.path)

    def cards(self, lib):
        "`{index of cell: its reference cards}`"
        return {i: cards(c.source, f"{lib}.{self.module}", "exports" in c.options)
                for i, c in enumerate(self.cells) if self.module and c.exported and "hide" not in c.options}


# Markdown ------------------------------------------------------------------------------------------------------------

def outside_code(change, text):
    "Apply `change` to `text`, but to no code block and no displayed equation."
    parts = re.split(r"(^```.*?^```|\$\$.*?\$\$)", text, flags=re.M | re.S)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def link_names(text, names):
    "`` `chunk_kda` `` → a reference to where it is defined; not in headings and not inside a link."
    def link(found):
        full = names.get(found[1])
        return f"{{py:obj}}`{found[1]}{found[2] or ''} <{full}>`" if full else found[0]
    pattern = re.compile(r"(?<![`\[\w])`([A-Za-z_][\w.]*)(\(\))?`(?![`\]])")
    return "\n".join(line if line.startswith("#") else pattern.sub(link, line) for line in text.split("\n"))


def link_pages(text, book, address):
    "Give every link to a notebook its `address`. A page that is planned but not written is named, not linked."
    def link(found):
        label, name, anchor = found[1], found[2], found[3] or ""
        if name in book.planned - book.notebooks: return label
        return f"[{label}]({address(name)}{anchor})" if name in book.notebooks else found[0]
    return re.sub(r"\[([^\]\[]+)\]\((?:\./)?([\w.-]+\.ipynb)(#[^)]*)?\)", link, text)


def callouts(text):
    "GitHub's `> [!NOTE]` quotes → admonitions."
    def admonition(found):
        body = re.sub(r"^> ?", "", found[2], flags=re.M)
        return f":::{{{found[1].lower()}}}\n{body.strip()}\n:::\n"
    return re.sub(r"^> \[!(\w+)\][ ]*\n((?:^>.*\n?)+)", admonition, text, flags=re.M)


def markdown(text, book):
    "Prose as MyST."
    page = lambda name: f"{slug(name)}.ipynb"
    return outside_code(lambda part: link_pages(link_names(callouts(part), book.names), book, page), text)


# cells ---------------------------------------------------------------------------------------------------------------

def metadata(cell, flags):
    "What myst-nb shall do with a code cell."
    tags = [tag for option, tag in (("echo", "remove-input"), ("output", "remove-output")) if cell.off(option)]
    tags += sorted(flags & cell.options.keys())
    if cell.options.get("code-fold") == "true": tags.append("hide-input")
    caption = cell.options.get("fig-cap", "")
    render = {"image": {"alt": cell.options.get("fig-alt") or caption or "figure"}}
    if caption: render["figure"] = {"caption": caption}
    return {"tags": tags, "mystnb": render}


def text_cell(source): return dict(cell_type="markdown", metadata={}, source=source)


def code_cell(cell, flags):
    return dict(cell_type="code", metadata=metadata(cell, flags), source=cell.source, outputs=cell.outputs,
                execution_count=None)


def displayed_prose(cell, book):
    "Markdown that a code cell displays is prose like any other: its names and pages are linked."
    shown = ("".join(out["data"]["text/markdown"]) for out in cell.outputs if "text/markdown" in out.get("data", {}))
    return [text_cell(markdown(text, book)) for text in shown]


def lower(page, book, toctrees=""):
    "The notebook that Sphinx reads."
    lead = f"\n\n{{.lead}}\n{markdown(page.question, book)}" if page.question else ""
    cells, reference = [text_cell(f"# {page.title}{lead}")], page.cards(book.lib)
    for i, cell in enumerate(page.cells):
        cells += [text_cell(card) for card in reference.get(i, {}).values() if card]
        if cell.hidden or not cell.source: continue
        if cell.kind != "code": cells.append(text_cell(markdown(cell.source, book)))
        elif prose := displayed_prose(cell, book): cells += ([] if cell.off("echo") else [code_cell(replace(cell, outputs=[]), book.flags)]) + prose
        else: cells.append(code_cell(cell, book.flags))
    if toctrees: cells.append(text_cell(toctrees))
    for i, cell in enumerate(cells): cell["id"] = f"c{i}"
    return dict(cells=cells, metadata={"language_info": {"name": "python", "pygments_lexer": "ipython3"}},
                nbformat=4, nbformat_minor=5)
