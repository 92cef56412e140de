"""Where FAIC runs: in a notebook, from a wheel, inside another repository, with several Pythons."""

import nbformat
import papermill
from papermill.clientwrap import PapermillNotebookClient

BARS = """
import time
from faic.core import ProgressBar
print('before')
for i in ProgressBar(range(3), desc='outer', mininterval=0):
    for j in ProgressBar(range(20), desc=f'inner {i}', leave=False, mininterval=0):
        time.sleep(.01)
"""


def new_notebook(file, *sources):
    """Write a notebook of these code cells."""
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    found = nbformat.v4.new_notebook(metadata=kernel, cells=[nbformat.v4.new_code_cell(s) for s in sources])
    nbformat.write(found, file)
    return file


# bars


def test_plain_papermill_shows_bars_and_stores_none(tmp_path, monkeypatch):
    drawn = []

    def watch(client, message, *rest, original=PapermillNotebookClient.process_message):
        if message["msg_type"].endswith("display_data"):
            drawn.append(message["content"]["data"].get("text/plain", ""))
        return original(client, message, *rest)

    monkeypatch.setattr(PapermillNotebookClient, "process_message", watch)
    notebook = new_notebook(tmp_path / "bars.ipynb", BARS, "print('after')", "for _ in ProgressBar(range(3)): pass")
    executed = papermill.execute_notebook(notebook, tmp_path / "out.ipynb", progress_bar=False)
    nbformat.validate(executed)
    outputs = [output for cell in executed.cells for output in cell.outputs]
    assert [o["text"] for o in outputs if o["output_type"] == "stream"] == ["before\n", "after\n"]
    assert [o["data"] for o in outputs if o["output_type"] == "display_data"] == [{}, {}], "one for each cell with bars"
    assert any("outer:  33%" in text and "\ninner 1:  50%" in text for text in drawn), (
        "both bars are shown while it runs"
    )
