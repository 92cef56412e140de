# make study   the whole study with the preset "smoke": photographs in, tables and figures out
# make test    everything that must hold: exports and notebooks in sync, the notebooks' own checks, tests
# make readme  README.md from nbs/index.ipynb
# make docs    the notebooks as a site that needs no network: _docs/html/index.html
# Each makes .venv first where it is not there. Another preset or folder: make study STUDY="--preset laptop --data /my/photographs"

PYTHON ?= python3
PY := .venv/bin/python
STUDY ?=

.PHONY: study test readme docs

study: .venv/ready
	@$(PY) -m faic study $(STUDY)

test: .venv/ready
	@OMP_NUM_THREADS=1 $(PY) -m pytest tests -n 2 --dist loadfile --timeout 1200

readme: .venv/ready
	@$(PY) -m nbconvert --to markdown --no-input --stdout nbs/index.ipynb | cat -s > README.md

docs: .venv/docs-ready
	@$(PY) nbs/docs/prepare.py _docs/source
	@$(PY) -m sphinx -W --keep-going -q -b html -c nbs/docs -d _docs/doctrees _docs/source _docs/html
	@echo "_docs/html/index.html"

.venv/ready: settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"FAIC needs Python 3.11 or later; {sys.executable} is {sys.version.split()[0]}. Give another: make study PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

.venv/docs-ready: .venv/ready
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@
