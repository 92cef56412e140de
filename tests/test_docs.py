"""The site that `make docs` builds: what notebooks become, that its links lead somewhere, that it needs no network."""

import ast
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import nbformat
import pytest

from faic.cli import main

ROOT = Path(__file__).resolve().parents[1]
EXTRA = ("sphinx", "myst_nb", "furo")
MISSING = [name for name in EXTRA if find_spec(name) is None]


@pytest.fixture
def prepare(monkeypatch):
    """The module that turns notebooks into pages."""
    monkeypatch.syspath_prepend(ROOT / "nbs" / "docs")
    import prepare

    return prepare


def commands():
    """Every line of the page `How do I ...` that calls faic."""
    text = (ROOT / "nbs" / "docs" / "howto.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line.startswith("faic ")]


@pytest.mark.parametrize("line", commands())
def test_the_commands_of_the_page_how_do_i_exist(line):
    words, command = shlex.split(line)[1:], main
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    context = click.Context(command)
    values, _, _ = command.make_parser(context).parse_args(list(words))
    if command is main.commands["run"]:
        notebook = nbformat.read(ROOT / "nbs" / f"{values['notebook']}.ipynb", 4)
        known = next(c.source for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
        for name, _ in values["parameters"]:
            assert re.search(rf"^{name}:", known, re.M), name


def test_links_of_the_page_how_do_i_lead_to_notebooks():
    text = (ROOT / "nbs" / "docs" / "howto.md").read_text(encoding="utf-8")
    assert all((ROOT / "nbs" / link).exists() for link in re.findall(r"\]\(([^)]*)\)", text))


def test_every_picture_of_a_page_is_in_the_site(prepare, tmp_path):
    prepare.copy_figures(tmp_path)
    shown = []
    for file in (ROOT / "nbs").glob("*.ipynb"):
        cells = [c.source for c in nbformat.read(file, 4).cells if c.cell_type == "markdown"]
        text = "\n".join(cells if file.stem == "index" else map(prepare.inside, cells))
        shown += [(file.name, place) for place in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)]
    assert ("66_app.ipynb", "figures/app.png") in shown
    assert not [(name, place) for name, place in shown if not (tmp_path / place).exists()]


def test_an_exported_cell_becomes_signatures_and_tables(prepare):
    from faic import core, runs

    source = (ROOT / "faic" / "core.py").read_text(encoding="utf-8")
    entries = {name: text for name, _, text in prepare.api_of(source, core)}
    assert "_announce_folders" not in entries
    text = entries["sample_per_image"]
    assert text.startswith(":::{py:function} sample_per_image(kind, shape: tuple, generator) -> torch.Tensor\n")
    assert r"| `shape` | `tuple` | (B,...) |" in text and r"| **returns** | `torch.Tensor` | of this shape" in text
    source = (ROOT / "faic" / "runs.py").read_text(encoding="utf-8")
    text = {name: text for name, _, text in prepare.api_of(source, runs)}["Run"]
    assert text.startswith("::::{py:class} Run(path: Path, options: dict)") and ":::{py:method} events()" in text


def test_a_command_shows_its_options(prepare):
    from faic import cli

    entries = prepare.api_of((ROOT / "faic" / "cli.py").read_text(encoding="utf-8"), cli)
    text = {name: text for name, _, text in entries}["colorize"]
    assert "| `-o, --out` | Folder for the results" in text and "\n\nExample: faic colorize grandmother.jpg" in text


def test_text_stays_text_and_code_stays_code(prepare):
    assert prepare.escape("2**levels, <folder>, $L$, see `a_b`") == r"2\*\*levels, \<folder\>, \$L\$, see `a_b`"
    node = ast.parse("def f(self, a, *, b: int = 1, **c) -> list: pass").body[0]
    assert prepare.signature(node) == "(a, *, b: int=1, **c) -> list"
    statements = ast.parse("from x import y\n_all_ = ['y']\nz = 1").body
    assert [prepare.is_import(node) for node in statements] == [True, True, False]


def test_a_diagram_becomes_a_list(prepare):
    text = "flowchart LR\n  a[one<br>two] --> b[three]\n  b -- every day --> c[four]\n"
    assert prepare.flow(text).splitlines() == ["- **one two** → three", "- **three** *every day* → four"]


class Page(HTMLParser):
    """What a page links to, what it loads, and the places that others may link to."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get("id"))
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in ("script", "img", "iframe", "source") and found.get("src"):
            self.loads.append(found["src"])
        if tag == "link" and found.get("rel") not in ("search", "index", "next", "prev", "canonical"):
            self.loads.append(found["href"])


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} missing: pip install -c constraints.txt -e '.[docs]'")
def test_the_site_is_whole_and_needs_no_network(tmp_path):
    """A warning of Sphinx, for example of a link that leads nowhere, fails the build."""
    source, site = tmp_path / "source", tmp_path / "site"
    subprocess.run([sys.executable, ROOT / "nbs" / "docs" / "prepare.py", source], check=True)
    words = ["-W", "--keep-going", "-q", "-b", "html", "-c", ROOT / "nbs" / "docs", source, site]
    done = subprocess.run([sys.executable, "-m", "sphinx", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    pages = {file: Page(file.read_text(encoding="utf-8")) for file in site.glob("*.html")}
    notebooks = {nb.stem for nb in (ROOT / "nbs").glob("*.ipynb")}
    assert notebooks | {"howto", "tables", "api", "genindex", "search"} <= {file.stem for file in pages}
    for file, page in pages.items():
        outside = [place for place in page.loads if urlsplit(place).scheme not in ("", "data")]
        assert not outside, f"{file.name} loads {outside}"
        assert all((site / unquote(urlsplit(p).path)).exists() for p in page.loads if not p.startswith("data:"))
        for link in page.links:
            parts = urlsplit(link)
            target = site / unquote(parts.path) if parts.path else file
            if parts.scheme or file.stem == "search":
                continue
            assert target.exists(), f"{file.name} links to {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{file.name} links to {link}"
    styles = "".join(file.read_text(encoding="utf-8") for file in site.glob("_static/**/*.css"))
    assert not re.search(r"url\(['\"]?https?:|@import ['\"]?https?:", styles)

    text = (site / "20_pix2pix.html").read_text(encoding="utf-8")
    assert "#| " not in text and "default_exp" not in text and "def show_rows" not in text  # a hidden cell
    assert 'id="faic.pix2pix.UNet.forward"' in text and "channels of the outermost level" in text
    assert "sample_per_image" in (site / "searchindex.js").read_text(encoding="utf-8")
