"""Reference cards: from an exported definition to the Sphinx entry that names, indexes and documents it.

A card is made from the source text alone. Nothing is imported or executed, so a page about a GPU kernel builds on a
laptop, and every interpreter writes the same card.
"""
import ast
import io
import tokenize
from copy import deepcopy

HEAD = ("Parameter", "Type", "Default", "Meaning")


def definitions(source):
    "The public functions and classes of a cell."
    return [node for node in ast.parse(source).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]


def comments(source):
    "`{line number: trailing comment}`"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def arguments(function):
    "`(name, annotation, default, line)` of each, in order, without `self`."
    args = function.args
    plain = args.posonlyargs + args.args
    defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
    rows = [*zip(plain, defaults), (args.vararg, None), *zip(args.kwonlyargs, args.kw_defaults), (args.kwarg, None)]
    return [(arg.arg, arg.annotation, default, arg.end_lineno) for arg, default in rows
            if arg and arg.arg not in ("self", "cls")]


def fields(cls):
    "The same for the annotated fields of a class, as a dataclass has them."
    return [(node.target.id, node.annotation, node.value, node.end_lineno)
            for node in cls.body if isinstance(node, ast.AnnAssign)]


def signature(name, function):
    "`name(a, b=1) -> Tensor`: no annotations but that of the result, no `self`."
    bare = deepcopy(function.args)
    for arg in ast.walk(bare):
        if isinstance(arg, ast.arg): arg.annotation = None
    first = next(iter(bare.args), None)
    if first and first.arg in ("self", "cls"): del bare.args[0]
    arrow = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"{name}({ast.unparse(bare)}){arrow}"


def code(node):
    return f"`{ast.unparse(node)}`".replace("|", r"\|") if node else ""


def prose(comment):
    "A comment as the text of a table cell."
    text = comment.replace("|", r"\|")
    return text if "`" in text else text.replace("*", r"\*")


def table(node, source):
    """The parameters of a function, or the fields of a class, with types, defaults and trailing comments, as Markdown.
    Empty columns are left out; nothing is left where there are only names."""
    notes, back = comments(source), getattr(node, "returns", None)
    result = prose(notes.pop(back.end_lineno, "")) if back else ""
    known = arguments(node) if isinstance(node, ast.FunctionDef) else fields(node)
    rows = [(f"`{name}`", code(kind), code(default), prose(notes.get(line, ""))) for name, kind, default, line in known]
    if result: rows.append(("*returns*", code(back), "", result))
    keep = [i for i in range(4) if any(row[i] for row in rows)]
    if len(keep) < 2: return ""
    lines = [HEAD, ["---"] * 4, *rows]
    return "\n".join("| " + " | ".join(line[i] for i in keep) + " |" for line in lines)


def folded(text):
    "Behind a click: the code right below the card says the same."
    raw = "```{{raw}} html\n{}\n```"
    return f"{raw.format('<details><summary>Parameters and shapes</summary>')}\n\n{text}\n\n{raw.format('</details>')}"


def constructor(cls):
    "Its `__init__`, or None."
    return next((node for node in cls.body if getattr(node, "name", "") == "__init__"), None)


def methods(cls):
    "The public methods of a class that say what they do."
    return [node for node in cls.body
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and ast.get_docstring(node)]


def entry(name, node, source, module, shown, inner=()):
    "One `py:function`, `py:class` or `py:method` directive. Where the page shows the code, it need not say it twice."
    is_class = isinstance(node, ast.ClassDef)
    kind = "class" if is_class else "method" if "." in name else "function"
    function = constructor(node) if is_class else node
    doc, grid = "" if shown else ast.get_docstring(node) or "", table(function or node, source)
    if grid: grid = f"::::{{container}} api-table\n\n{folded(grid) if shown else grid}\n\n::::"
    fence = "`" * (8 if inner else 6)
    title = signature(name, function) if function else name
    return "\n\n".join([f"{fence}{{py:{kind}}} {title}\n:module: {module}", doc, grid, *inner, fence])


def cards(source, module, shown):
    """`{qualified name: Markdown}` for the definitions of a cell; methods stand in their class's card and map to "".
    `shown` says whether the page shows the code of the cell."""
    found = {}
    for node in definitions(source):
        public = methods(node) if isinstance(node, ast.ClassDef) else []
        inner = [entry(f"{node.name}.{method.name}", method, source, module, shown) for method in public]
        found[f"{module}.{node.name}"] = entry(node.name, node, source, module, shown, inner)
        found |= {f"{module}.{node.name}.{method.name}": "" for method in public}
    return found
