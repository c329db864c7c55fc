# Needs python3 with venv, and make. Everything is installed into .venv; a second run installs nothing.

PYTHON ?= python3
PY := .venv/bin/python
RUN := .venv/.installed-run
DEV := .venv/.installed-dev
OPEN := MIT;BSD;Apache;PSF;Python Software Foundation;ISC;MPL-2.0;Mozilla Public License 2.0;CNRI-Python;Zlib;CC0-1.0;BSL-1.0;0BSD

help:
	@echo "aespa_nb: attention-aware quantization, taught by the notebooks it is built from"
	@echo
	@echo "  make demo             quantize the bundled model to 2 and 3 bits and compare the methods (into build/demo)"
	@echo "  make smollm2          fetch a language model of 135 million parameters, and a book to calibrate it with"
	@echo "  make lab              open the tour and the chapters in JupyterLab (as root: ARGS=--allow-root)"
	@echo "  make docs             build the site (docs/_build/html/index.html)"
	@echo "  make test             everything CI checks, 15 to 20 minutes on 2 cores"
	@echo
	@echo "After an edit in nbs/:"
	@echo "  make export           notebooks -> library and README"
	@echo "  make notebooks        the same, after running the notebooks and storing their outputs"
	@echo "                        (make notebooks NBS=nbs/rounding/13_gptq.ipynb for one)"
	@echo
	@echo "Seldom:"
	@echo "  make records          measure again what is stale in nbs/runs (up to days on a CPU;"
	@echo "                        ARGS=--list names it, ARGS='bits texts' makes only these)"
	@echo "  make reference        train the bundled model again (hours on a CPU)"
	@echo "  make constraints      pin the versions that are installed now"
	@echo "  make audit            licences, known vulnerabilities and an SBOM of what users install (network)"
	@echo "  make clean            remove what was built; .venv stays"

# --- for readers ----------------------------------------------------------------------------------------------------

demo: $(RUN)
	@rm -rf build/demo
	$(PY) -m aespa_nb demo --out build/demo

smollm2: $(RUN)
	$(PY) -m aespa_nb fetch smollm2
	$(PY) -m aespa_nb fetch handbook

lab: $(DEV)
	MATPLOTLIBRC=$(CURDIR)/tools/matplotlibrc $(PY) -m jupyterlab --notebook-dir=nbs \
	  --LabApp.default_url=/lab/tree/start/00_tour.ipynb $(ARGS)

docs: $(DEV)
	@rm -rf docs/_build/html
	$(PY) -m sphinx -q -E -W --keep-going -j auto -b html -d docs/_build/doctrees docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

# --- for authors ----------------------------------------------------------------------------------------------------

test: $(DEV)
	@$(PY) tools/run_checks.py

export: $(DEV)
	.venv/bin/nbdev_export
	.venv/bin/nbdev_clean
	$(PY) tools/make_readme.py

notebooks: $(DEV)
	.venv/bin/nbdev_export
	$(PY) tools/run_nbs.py $(NBS)
	$(MAKE) export

# --- seldom ---------------------------------------------------------------------------------------------------------

records: $(DEV)
	OMP_NUM_THREADS=1 $(PY) experiments/records.py $(ARGS)

reference: $(DEV)
	$(PY) -m pip install -q --no-deps --only-binary=:all: --target build/reference/extra -r experiments/reference.txt
	set -e; for step in corpus train finish; do $(PY) experiments/train_reference.py $$step; done

constraints: $(DEV)
	echo "# The exact set that CI uses, for Python 3.11 and newer: make constraints" > constraints.txt
	$(PY) -m pip list --format=freeze --exclude aespa_nb --exclude pip | sed 's/+.*//' >> constraints.txt

# What a user's installation holds. The tools that look at it have an environment of their own.
audit:
	$(PYTHON) tools/install.py --venv build/user
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install -q --disable-pip-version-check pip-audit pip-licenses cyclonedx-bom
	build/audit/bin/pip-licenses --python build/user/bin/python --ignore-packages aespa_nb pip setuptools \
	  --partial-match --allow-only "$(OPEN)" --format markdown --output-file build/audit/licences.md
	{ sed '/^|/,$$d' docs/licences.md; cat build/audit/licences.md; } > build/audit/page.md
	mv build/audit/page.md docs/licences.md
	build/audit/bin/pip-audit --skip-editable --path $$(build/user/bin/python -c 'import site; print(site.getsitepackages()[0])')
	build/audit/bin/cyclonedx-py environment build/user/bin/python --pyproject pyproject.toml -o build/audit/sbom.json
	@echo "Licences: docs/licences.md. Bill of materials: build/audit/sbom.json"

clean:
	rm -rf build docs/_build docs/nbs docs/api/generated

# Stamps: made again when what is to be installed has changed.
$(RUN): pyproject.toml constraints.txt tools/install.py
	$(PYTHON) tools/install.py fast
	@touch $@

$(DEV): $(RUN)
	$(PYTHON) tools/install.py dev,docs
	@touch $@

.DEFAULT_GOAL := help
.PHONY: help demo smollm2 lab docs test export notebooks records reference constraints audit clean
