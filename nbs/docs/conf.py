"""Sphinx reads this: the site that `make docs` builds from the notebooks.

Sphinx with MyST-NB and Furo renders mathematics and searches offline, links every function, and fails at a broken link.
MkDocs with Material loads MathJax from the network, and its support ends in May 2027.
"""

import json
import sys
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.transforms import SphinxTransform

sys.path[:0] = [str(Path(__file__).resolve().parent)]
from prepare import settings  # noqa: E402

project, author, copyright = settings()["title"], settings()["author"], settings()["copyright"].partition(", ")[2]
extensions = ["myst_nb", "sphinx-mathjax-offline"]
html_theme = "furo"
html_title = "FAIC"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
pygments_style, pygments_dark_style = "friendly", "monokai"
exclude_patterns = ["figures/**.md"]
nb_execution_mode = "off"  # the stored outputs are shown
nb_merge_streams = True
nb_render_markdown_format = "gfm"
nb_code_prompt_show = "Source"
nb_code_prompt_hide = "Source"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 4
add_module_names = False
python_maximum_signature_line_length = 72
python_use_unqualified_type_names = True
smartquotes = False
suppress_warnings = ["ref.python"]  # types that two chapters define under one name


class LinkNames(SphinxTransform):
    """Link each name of a function or class that the text sets as code."""

    default_priority = 900

    def apply(self, **kwargs):
        for node in list(self.document.findall(nodes.literal)):
            name = node.astext().removesuffix("()")
            inside = (nodes.reference, nodes.title, pending_xref)
            parents = iter_parents(node)
            target = self.find(name)
            if target is None or node.get("classes") or any(isinstance(p, inside) for p in parents):
                continue
            link = pending_xref("", refdomain="py", reftype="obj", reftarget=target, refwarn=True)
            node.replace_self(link)
            link += node

    def find(self, name):
        """The full name: of this chapter's own module, or of the only module that has it; else None."""
        if not ("_" in name or name[:1].isupper()):  # a word that may mean something else
            return None
        modules = json.loads((Path(self.app.srcdir) / "names.json").read_text()).get(name, [])
        own = f"faic.{self.env.docname[3:]}"
        module = own if own in modules else modules[0] if len(modules) == 1 else None
        return module and f"{module}.{name}"


def iter_parents(node):
    """All nodes around a node."""
    while node.parent is not None:
        node = node.parent
        yield node


def setup(app):
    app.add_transform(LinkNames)
