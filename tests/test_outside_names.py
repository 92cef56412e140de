"""Names from outside, of files, folders and runs, are text: no formula, no markup, no template, no number."""

import dataclasses
import json
import subprocess
import sys

import matplotlib.pyplot as plt
import mistune
import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from faic.core import RESULT_SOFTWARE, RESULTS_MARKER
from faic.drawing import add_footer, picture_row, sample_grid, save_figure, style
from faic.notes import example_selection
from faic.parameters import ParameterError, notebook_parameters
from faic.results import runs_text
from faic.study import run_notebook
from faic.tables import Table, markdown_text

NAMES = [
    r"$\frac{1$.png",
    "$x$",
    r"\$5 and $6$",
    "100%_of #1 & co.",
    "a\nb\x1b[31m\u202egnp",
    b"caf\xe9.jpg".decode(errors="surrogateescape"),
    "{x} {0} {{",
    "<script>alert(1)</script>",
    "x" * 250 + ".jpg",
    "祖母.jpg",
]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_a_figure_is_drawn_as_it_is(tmp_path, name):
    """Also where the user's own style gives all text to LaTeX."""
    image = np.zeros((1, 8, 8, 3), np.uint8)
    with plt.rc_context({"text.usetex": True}):
        figures = [
            sample_grid({name: image, "words": name}, name, [f"data {name}; seed 0"]),
            picture_row({name: Image.new("L", (8, 8))}),
        ]
        for i, fig in enumerate(figures):
            save_figure(fig, tmp_path, f"{i}")
    texts = [t for fig in figures for t in fig.findobj(plt.Text) if t.get_text()]
    assert len(texts) >= 5 and not any(t.get_usetex() for t in texts)
    drawn = [t._preprocess_math(t.get_text()) for t in texts]
    assert not any(kind for _, kind in drawn)
    if name == r"$\frac{1$.png":
        assert sum(name in text for text, _ in drawn) == 5


def test_a_footer_is_wrapped_before_its_dollar_signs_are_marked():
    with style():
        fig = plt.figure(figsize=(1, 1))
    add_footer(fig, "$" * 99)
    assert fig._supxlabel._preprocess_math(fig._supxlabel.get_text()) == ("\n".join(["$" * 24] * 4 + ["$" * 3]), False)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (3, 9_000), (4_000, 4_000), (1, 1)])
def test_a_preview_is_bounded_in_pixels(tmp_path, size):
    file = save_figure(picture_row({"gray": Image.new("L", size), "colorized": Image.new("RGB", size)}), tmp_path, "f")
    with Image.open(file) as drawn:
        assert max(drawn.size) < 1600 and file.stat().st_size < 200_000


def test_a_figure_says_that_it_is_a_result(tmp_path):
    file = save_figure(picture_row({"gray": Image.new("L", (9, 9))}), tmp_path / "page", "f")
    with Image.open(file) as drawn:
        assert drawn.info["Software"].startswith(RESULT_SOFTWARE)
    assert (tmp_path / "page" / RESULTS_MARKER).exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_a_table_is_no_markup(name):
    frame = pd.DataFrame({"entry": ["model"], "score": [f"1 {name}"]})
    page = Table(f"Table of {name}", frame, frame.set_index("entry"), [f"left out: {name}"], f"data {name}")
    html = mistune.html(page.markdown())
    shown = mistune.html(markdown_text(name))
    for tag in ("<script", "<em>", "<img", "<a ", "<h1"):
        assert tag not in html and tag not in shown
    assert len([line for line in page.markdown().splitlines() if line.startswith("|")]) == 3
    assert [line[:2] for line in page.csv().split("\n")[-4:]] == ["# ", "# ", "# ", ""]


def test_a_data_set_s_name_in_a_page_is_no_markup():
    page = dataclasses.replace(example_selection(), data="<img src=x> $x$ _all_", runs={}, other_seeds={})
    assert r"data \<img src=x> \$x\$ \_all\_;" in runs_text(page)


PROBE = """
from faic.parameters import notebook_parameters
p = notebook_parameters(globals(), 'photo', 'run', 'out', 'data', 'seed')
print(repr((p.photo, p.run, p.out, p.data, p.seed)))
"""


@pytest.fixture
def probe(tmp_path):
    """A notebook that prints its parameters, in a folder whose name is a template."""
    folder = tmp_path / "my{x}folder {} {0"
    (folder / "nbs").mkdir(parents=True)
    names = ("photo", "run", "out", "data", "seed")
    cells = [nbformat.v4.new_code_cell("".join(f"{n} = ''\n" for n in names), metadata=dict(tags=["parameters"]))]
    book = nbformat.v4.new_notebook(cells=[*cells, nbformat.v4.new_code_cell(PROBE)])
    book.metadata["kernelspec"] = dict(name="python3", language="python", display_name="python3")
    nbformat.write(book, folder / "nbs" / "probe.ipynb")
    return folder


def printed(file):
    cells = json.loads(file.read_text())["cells"]
    return "".join("".join(o.get("text", "")) for c in cells for o in c.get("outputs", []))


def test_braces_in_a_path_are_no_template(probe, monkeypatch):
    """Neither in the folder of the repository, nor in that of the runs, nor in a parameter."""
    monkeypatch.setattr("faic.study.notebook_path", lambda name: probe / "nbs" / f"{name}.ipynb")
    monkeypatch.chdir(probe)
    (probe / "study-{preset}").mkdir()
    parameters = dict(photo="{photo}.jpg", run="a", out="{}", data="{data[0]}", seed="3")
    executed = run_notebook("probe", parameters, probe / "study-{preset}")
    assert executed == probe / "study-{preset}" / "probe.ipynb"
    assert "('{photo}.jpg', 'a', '{}', '{data[0]}', 3)" in printed(executed)


def test_what_was_typed_for_a_text_is_taken(probe):
    """papermill hands over 7, 1000.0, None and True."""
    typed = dict(photo="007", run="1e3", out="None", data="True", seed="3")
    words = [word for name, text in typed.items() for word in ("-p", name, text)]
    command = [sys.executable, "-m", "papermill", "nbs/probe.ipynb", "out.ipynb", "--no-progress-bar", *words]
    done = subprocess.run(command, cwd=probe, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "('007', '1e3', 'None', 'True', 3)" in printed(probe / "out.ipynb")


@pytest.mark.parametrize("name", ["photo", "run", "out", "data", "device", "latent", "first_stage", "budget"])
@pytest.mark.parametrize("value", [1e3, True, None, float("nan")])
def test_a_value_whose_text_is_not_known_names_the_option_that_helps(name, value):
    with pytest.raises(ParameterError, match=f"expected text.*write -r {name} and the text"):
        notebook_parameters({name: value}, name)
    if name in ("photo", "run", "out", "data"):
        assert vars(notebook_parameters({name: 2024}, name)) == {name: "2024"}
