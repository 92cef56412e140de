"""Turns the notebooks into the pages that Sphinx reads; nothing is executed, the stored outputs are shown.

    python nbs/docs/prepare.py FOLDER

`make docs` starts it. A cell that nbdev exports becomes signatures, tables of parameters and folded source; a cell that
nbdev hides is left out; README's table of chapters becomes the side bar.
"""

import ast
import json
import re
import shutil
import sys
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import click
import nbformat
from fastcore.docments import docments
from nbdev.process import extract_directives

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FIGURES = "figures/laptop-tiny-imagenet"  # the results that README shows
ESCAPED = re.compile(r"([\\`*_{}\[\]<>$|#])")


def settings():
    """The section of settings.ini."""
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def escape(text):
    """Escape plain text for Markdown; text between backticks stays code."""
    pieces = str(text).split("`")
    if len(pieces) % 2 == 0:
        return ESCAPED.sub(r"\\\1", str(text))
    return "".join(f"`{p}`" if i % 2 else ESCAPED.sub(r"\\\1", p) for i, p in enumerate(pieces)).replace("\n", " ")


# The API -------------------------------------------------------------------------------------------------------------


def signature(node):
    """The arguments and return type of a function or class, as Python writes them, without `self`."""
    if isinstance(node, ast.ClassDef):
        methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
        if "__init__" in methods:
            return signature(methods["__init__"]).partition(" -> ")[0]
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)] if node.decorator_list else []
        return "(" + ", ".join(map(field_text, fields)) + ")"
    arguments = re.sub(r"^(self|cls)(, |$)", "", ast.unparse(node.args))
    return f"({arguments})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def field_text(node):
    """A field of a dataclass as an argument."""
    text = f"{ast.unparse(node.target)}: {ast.unparse(node.annotation)}"
    if node.value is None:
        return text
    made = isinstance(node.value, ast.Call)
    return f"{text} = {'...' if made else ast.unparse(node.value)}"


def parameter_table(symbol, node):
    """The comments of a signature as a table of Markdown; '' where there is none."""
    try:
        found = docments(symbol, full=True)
    except (TypeError, ValueError, OSError, SyntaxError):
        return ""
    annotations = annotations_of(node)
    lines = []
    for name, entry in found.items():
        if entry.docment and name not in ("self", "cls"):
            shown = "**returns**" if name == "return" else f"`{name}`"
            kind = f"`{annotations[name]}`" if annotations.get(name) else ""
            lines.append(f"| {shown} | {kind} | {escape(entry.docment)} |")
    return "\n".join(["| | type | |", "|---|---|---|", *lines]) if lines else ""


def option_table(command):
    """The arguments and options of a command of click as a table of Markdown."""
    rows = [(", ".join(p.opts), escape(getattr(p, "help", None) or "")) for p in command.params]
    lines = [f"| `{names}` | {text} |" for names, text in rows]
    return "\n".join(["| option | |", "|---|---|", *lines]) if lines else ""


def annotations_of(node):
    """Parameter -> type, as the source writes it."""
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if inits:
            return annotations_of(inits[0])
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        return {ast.unparse(n.target): ast.unparse(n.annotation) for n in fields}
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    found = {a.arg: ast.unparse(a.annotation) for a in every if a is not None and a.annotation}
    return found | ({"return": ast.unparse(node.returns)} if node.returns else {})


def directive(kind, name, node, symbol, inner=""):
    """One entry of the API: signature, docstring, table of parameters, methods."""
    paragraphs = [escape(p) for p in (ast.get_docstring(node) or "").split("\n\n")]
    table = option_table(symbol) if isinstance(symbol, click.Command) else parameter_table(symbol, node)
    body = [*paragraphs, table, inner]
    fence = ":" * (4 if inner else 3)
    return f"{fence}{{py:{kind}}} {name}{signature(node)}\n" + "\n\n".join(b for b in body if b) + f"\n{fence}\n"


def methods(node, symbol):
    """The entries of a class's public methods that have a docstring or documented parameters."""
    found = []
    for n in node.body:
        if not isinstance(n, ast.FunctionDef) or (n.name.startswith("_") and n.name != "__call__"):
            continue
        attribute = getattr(symbol, n.name, None)
        attribute = getattr(attribute, "fget", attribute)
        if ast.get_docstring(n) or parameter_table(attribute, n):
            found.append(directive("method", n.name, n, attribute))
    return "\n".join(found)


def api_of(source, module):
    """The entries of the public functions and classes of an exported cell: list of (name, summary, Markdown)."""
    found = []
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        symbol = getattr(module, node.name)
        is_class = isinstance(node, ast.ClassDef)
        inner = methods(node, symbol) if is_class else ""
        text = directive("class" if is_class else "function", node.name, node, symbol, inner)
        summary = (ast.get_docstring(node) or "").split("\n")[0]
        found.append((node.name, summary, text))
    return found


# The pages -----------------------------------------------------------------------------------------------------------


def chapter(path, entries):
    """A notebook as a page; `entries` (module -> list of (name, summary)) gets its API."""
    book = nbformat.read(path, 4)
    name = next(
        (re.search(r"#\| *default_exp +(\S+)", c.source) for c in book.cells if "default_exp" in c.source), None
    )
    module = import_module(f"faic.{name[1]}") if name and name[1] != "__main__" else None
    cells = []
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = inside(cell.source)
            cells.append(cell)
            if module and len(cells) == 1:
                cells.append(nbformat.v4.new_markdown_cell(f"```{{py:module}} {module.__name__}\n```"))
        else:
            cells += code_cells(cell, module, entries)
    book.cells = cells
    return book


def inside(text):
    """A notebook's Markdown for the site, whose figures lie in the folder of the pages."""
    return text.replace("](../figures/", "](figures/")


def copy_figures(folder):
    """Put the pictures that the pages show, and the cards of released weights, into the folder of the pages."""
    shutil.copytree(ROOT / FIGURES, folder / FIGURES)
    for picture in (ROOT / "figures").glob("*.png"):
        shutil.copy(picture, folder / "figures")
    cards = folder / "faic" / "weights"
    cards.mkdir(parents=True)
    for picture in (ROOT / "faic" / "weights").glob("*.jpg"):
        shutil.copy(picture, cards)
    for card in (ROOT / "faic" / "weights").glob("*.md"):
        text = card.read_text(encoding="utf-8")
        (cards / card.name).write_text(f"---\norphan: true\n---\n\n{text}", encoding="utf-8")


def is_import(node):
    """Whether a statement only takes names from other chapters, or passes them on (nbdev's `_all_`)."""
    return isinstance(node, (ast.Import, ast.ImportFrom)) or ast.unparse(node).startswith("_all_ = ")


def code_cells(cell, module, entries):
    """The cells that a code cell becomes."""
    found = extract_directives(cell)
    cell.source = cell.source.strip("\n")
    cell.execution_count = None
    if {"default_exp", "hide"} & set(found) or not cell.source:
        return []
    body = ast.parse(cell.source).body
    if "export" not in found:
        if "hide_input" in found:
            cell.metadata.tags = ["remove-input"]
        return [cell]
    if module is None or all(is_import(node) for node in body):
        return []
    entries_here = api_of(cell.source, module)
    entries.setdefault(module.__name__, []).extend((name, summary) for name, summary, _ in entries_here)
    if any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in body):
        cell.metadata.tags = ["hide-input"]
    text = "\n".join(text for *_, text in entries_here)
    return ([nbformat.v4.new_markdown_cell(text)] if text else []) + [cell]


def flow(text):
    """README's Mermaid diagram as a list: each box with the boxes that it leads to."""
    titles = dict(re.findall(r"(\w+)\[([^\]]*)\]", text))
    lines = []
    for start, label, end in re.findall(r"^ *(\w+)(?:\[[^\]]*\])? *(?:--(.*?))?--> *(\w+)", text, re.M):
        label = re.sub(r"<br>|\s+", " ", label or "").strip()
        arrow = f"*{label}* → " if label else "→ "
        lines.append(f"- **{titles[start]}** {arrow}{titles[end]}".replace("<br>", " "))
    return "\n".join(lines)


def rewrite(text, url):
    """README's Markdown for the site: links to notebooks and results, no diagram that needs a script."""
    text = re.sub(r"```mermaid\n(.*?)```", lambda m: flow(m[1]), text, flags=re.S)
    text = text.replace("](nbs/", "](").replace(f"]({FIGURES})", "](tables.md)")
    text = re.sub(rf"\]\({FIGURES}/(\w+)\.md\)", r"](tables.md#\1)", text)
    return re.sub(r"\]\((tests/[^)]*)\)", rf"]({url}/tree/main/\1)", text)


def index(url):
    """The first page: README, with the chapters of its table in the side bar. Also: floor -> names of notebooks."""
    book = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    texts = []
    for cell in book.cells:
        if cell.cell_type == "markdown":
            texts.append(cell.source)
        for output in cell.get("outputs", []):
            if "text/markdown" in output.get("data", {}):
                texts.append(output.data["text/markdown"])
    text = rewrite("\n\n".join(texts), url)
    floors = {}
    for floor, row in re.findall(r"^\| ([\w ]+) \| (\[.*\]\(\w+\.ipynb\).*) \|$", text, re.M):
        floors[floor] = re.findall(r"\[([^\]]+)\]\((\w+)\.ipynb\)", row)
    toctrees = [toctree("", [("How do I ...", "howto"), ("Tables and figures", "tables"), ("API", "api")])]
    seen = set()
    for floor, names in floors.items():
        toctrees.append(toctree(floor, [(heading(name) if title in seen else title, name) for title, name in names]))
        seen |= {title for title, _ in names}
    return text + "\n\n" + "\n\n".join(toctrees), floors


def heading(name):
    """The title of a notebook."""
    return nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4).cells[0].source.split("\n")[0].lstrip("# ")


def toctree(caption, names):
    """A hidden table of contents, for the side bar."""
    head = f":caption: {caption[0].upper() + caption[1:]}\n" if caption else ""
    titles = {name: title.replace("`", "").replace("_", " ") for title, name in names}
    lines = "\n".join(f"{title[0].upper() + title[1:]} <{name}>" for name, title in titles.items())
    return f"```{{toctree}}\n:hidden:\n{head}\n{lines}\n```"


def tables():
    """A page with the tables and figures that README discusses."""
    parts = [
        "# Tables and figures",
        f"The study that the first page quotes, from the folder `{FIGURES}` of the repository.",
    ]
    for file in sorted((ROOT / FIGURES).glob("*.md")):
        text = re.sub(r"^#+ (.*)$", r"**\1**", file.read_text(encoding="utf-8"), flags=re.M)
        parts.append(f"## {file.stem}\n\n{text}")
    parts.append("## Figures")
    parts += [f"![{file.stem}]({FIGURES}/{file.name})" for file in sorted((ROOT / FIGURES).glob("*.png"))]
    return "\n\n".join(parts) + "\n"


def api(floors, modules, entries):
    """A page that lists every public function and class by chapter."""
    parts = [
        "# API",
        "Every public function and class, in the order of the chapters. {ref}`genindex` sorts them by name.",
    ]
    for floor, names in floors.items():
        chapters = [(title, name) for title, name in names if entries.get(modules.get(name))]
        if chapters:
            parts.append(f"## {floor[0].upper() + floor[1:]}")
        for title, name in chapters:
            module = modules[name]
            lines = [f"- {{py:obj}}`{n} <{module}.{n}>`: {escape(s)}" for n, s in entries[module]]
            parts.append(f"### [{module}]({name}.ipynb)\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def prepare(folder):
    """Write all pages into a folder that is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    url, entries, modules = settings()["git_url"], {}, {}
    front, floors = index(url)
    listed = {name for names in floors.values() for _, name in names}
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        if path.stem == "index":
            continue
        book = chapter(path, entries)
        if path.stem not in listed:
            book.metadata["orphan"] = True
        if path.stem[:2].isdigit():
            modules[path.stem] = f"faic.{path.stem[3:]}"
        nbformat.write(book, folder / path.name)
    copy_figures(folder)
    places = {}
    for module, found in entries.items():
        for name, _ in found:
            places.setdefault(name, []).append(module)
    (folder / "names.json").write_text(json.dumps(places), encoding="utf-8")
    pages = {"index": front, "tables": tables(), "api": api(floors, modules, entries)}
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    shutil.copy(HERE / "howto.md", folder)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]).resolve())
