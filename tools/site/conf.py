"""Sphinx settings. What the project is called, and where it lives, comes from settings.ini."""
import ast
import functools
import json
import os
import re
from configparser import ConfigParser
from html import escape
from pathlib import Path

from docutils import nodes

root = Path(os.environ["KDA_ROOT"])
ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read(root / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
blob = f"{cfg['git_url']}/blob/{cfg['branch']}"
about = json.loads((Path(__file__).parent / "pages.json").read_text(encoding="utf-8"))

project, author, copyright = cfg["title"], cfg["author"], cfg["copyright"]
release = version = cfg["version"]
extensions = ["myst_nb", "sphinx_copybutton", "sphinx.ext.mathjax", "sphinx.ext.linkcode"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", rf"(?!{cfg['lib_name']}\.).*")]

# notebooks: stored outputs, nothing runs
nb_execution_mode = "off"
nb_merge_streams = True
nb_output_stderr = "remove"
nb_mime_priority_overrides = [("html", "image/svg+xml", 10)]
myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
copybutton_selector = "div.cell_input pre, div.highlight-sh pre, div.highlight-python pre"

# maths: MathJax lies next to the pages
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"chtml": {"mtextInheritFont": True}, "options": {"enableMenu": False}}

# reference cards
add_module_names = False
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True

# look
html_theme = "furo"
html_title = cfg["title"]
html_favicon = "_static/logo.svg"
html_logo = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["kda.css"]
html_copy_source = False
html_show_sourcelink = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
html_theme_options = dict(
    light_css_variables={"color-brand-primary": "#3b4cca", "color-brand-content": "#3b4cca",
                         "color-code-background": "#f7f7f9",
                         "color-sidebar-link-text": "var(--color-foreground-secondary)",
                         "color-sidebar-link-text--top-level": "var(--color-foreground-secondary)",
                         "color-sidebar-caption-text": "var(--color-foreground-muted)"},
    dark_css_variables={"color-brand-primary": "#9aa8ff", "color-brand-content": "#9aa8ff",
                        "color-background-primary": "#14161c", "color-background-secondary": "#181b22",
                        "color-code-background": "#1b1e26"},
    top_of_page_buttons=[],
    footer_icons=[dict(name="GitHub", url=cfg["git_url"], html="GitHub")],
)


@functools.cache
def lines(module):
    "`{name: line}` of the definitions in a module; `Class.method` too."
    found = {}
    for node in ast.parse((root / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")).body:
        if not hasattr(node, "name"): continue
        found[node.name] = node.lineno
        found |= {f"{node.name}.{m.name}": m.lineno for m in node.body if hasattr(m, "name")}
    return found


def linkcode_resolve(domain, info):
    "The address of the source of a reference card."
    line = lines(info["module"]).get(info["fullname"])
    return f"{blob}/{info['module'].replace('.', '/')}.py#L{line}" if line else None


def name_sources(page, body):
    "Under the title: the notebook that is this page, and the module that it exports."
    notebook, module = about["pages"][page]
    paths = [notebook] + ([f"{cfg['lib_name']}/{module}.py"] if module else [])
    links = " → ".join(f'<a href="{blob}/{path}">{path}</a>' for path in paths)
    return body.replace("</h1>", f'</h1>\n<p class="sources">{links}</p>', 1)


def link_code(app, page, body):
    "In code cells, a name of the package is a link to its definition; attributes, keywords and assigned names are not."
    def link(found):
        full = about["names"].get(found[1])
        if not full: return found[0]
        target = full.split(".")[1]
        address = ("" if target == about["pages"][page][1] else app.builder.get_relative_uri(page, target)) + f"#{full}"
        return f'<a class="name" href="{escape(address)}">{found[0]}</a>'
    plain = re.compile(r'(?<!<span class="o">\.</span>)<span class="n">(\w+)</span>(?!\s*<span class="o">=</span>)')
    cell = re.compile(r'<div class="cell_input docutils container">.*?</pre>', re.S)
    return cell.sub(lambda found: plain.sub(link, found[0]), body)


def link_figures(body):
    "A figure is a link to itself, so that a phone can show it in full."
    return re.sub(r'<img [^>]*src="(_images/[^"]+)"[^>]*>', r'<a class="figure" href="\1">\g<0></a>', body)


def plain_maths(app, doctree):
    "Leave displayed equations as they are written; Sphinx would put some into an environment that allows no tag."
    for node in doctree.findall(nodes.math_block):
        if node.get("no-wrap"): continue
        node["no-wrap"] = True
        node.children = [nodes.Text(f"\\[{node.astext()}\\]")]


def finish_page(app, page, template, context, doctree):
    if page == "search": app.add_js_file("search_text.js", loading_method="defer")
    if page not in about["pages"] or not context.get("body"): return
    body = link_figures(link_code(app, page, context["body"]))
    context["body"] = body if page == "index" else name_sources(page, body)


def setup(app):
    app.connect("doctree-read", plain_maths)
    app.connect("html-page-context", finish_page)
