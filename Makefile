# Needs python3 with venv, and make. Everything is installed into .venv; a second run installs nothing.

PYTHON ?= python3
PY := .venv/bin/python
RUN := .venv/.installed-run
DEV := .venv/.installed-dev

help:
	@echo "aespa_nb: attention-aware quantization, taught by the notebooks it is built from"
	@echo
	@echo "  make demo             quantize the bundled model to 2 and 3 bits and compare the methods (into build/demo)"
	@echo "  make lab              open the tour and the chapters in JupyterLab (as root: ARGS=--allow-root)"
	@echo "  make docs             build the site (docs/_build/html/index.html)"
	@echo "  make test             everything CI checks, some 20 minutes on 2 cores"
	@echo
	@echo "After an edit in nbs/:"
	@echo "  make export           notebooks -> library and README"
	@echo "  make notebooks        the same, after running the notebooks and storing their outputs"
	@echo "                        (make notebooks NBS=nbs/rounding/13_gptq.ipynb for one)"
	@echo
	@echo "Seldom:"
	@echo "  make train-reference  train the bundled model again (hours on a CPU)"
	@echo "  make campaign         repeat the long measurements behind chapters 10 and 32 (hours on a CPU)"
	@echo "  make comparison       run what is missing of the chapter on the comparison's comparison (a day on a CPU)"
	@echo "  make faults           kill runs, fill disks, damage files, for the chapter on faults (an hour; the disks need root)"
	@echo "  make hostile          of these, only damaged files and hostile input, 47 kinds (ten minutes)"
	@echo "  make torture          round damaged models with every preset (half an hour on a CPU)"
	@echo "  make arithmetic       the same runs with other processors' arithmetic, for the chapter on faults (half an hour on a CPU)"
	@echo "  make audit            licences, known vulnerabilities and an SBOM of what users install (network)"
	@echo "  make plan-check       hold aespa_nb plan against real runs, for the chapter on planning a run (twenty minutes on an idle CPU)"
	@echo "  make constraints      pin the versions that are installed now"
	@echo "  make clean            remove what was built; .venv stays"

demo: $(RUN)
	@rm -rf build/demo
	$(PY) -m aespa_nb demo --out build/demo

test: $(DEV)
	@$(PY) tools/run_checks.py

docs: $(DEV)
	@rm -rf docs/_build/html
	$(PY) -m sphinx -q -E -W --keep-going -b html -d docs/_build/doctrees docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

lab: $(DEV)
	MATPLOTLIBRC=$(CURDIR)/tools/matplotlibrc $(PY) -m jupyterlab --notebook-dir=nbs --LabApp.default_url=/lab/tree/start/00_tour.ipynb $(ARGS)

export: $(DEV)
	.venv/bin/nbdev_export
	.venv/bin/nbdev_clean
	$(PY) tools/make_readme.py

notebooks: $(DEV)
	.venv/bin/nbdev_export
	$(PY) tools/run_nbs.py $(NBS)
	$(MAKE) export

train-reference: $(DEV)
	set -e; for step in fetch corpus tokens "train --minutes 44" \
	  "train --minutes 66 --init build/reference/first" finish; do $(PY) tools/train_reference.py $$step; done

campaign: $(DEV)
	$(PY) tools/campaign.py ablations
	$(PY) tools/campaign.py precompute
	$(PY) tools/campaign.py layers

METHODS := rtn awq omniquant affinequant gptq zfold turboboa adaround brecq signround aespa best max
comparison: $(DEV)
	OMP_NUM_THREADS=1 $(PY) -m aespa_nb compare reference --presets $(METHODS) --bits 2 3 4 --group-sizes 0 64 \
	  --seeds 0 1 2 --samples 64 --eval-samples 128 --out nbs/runs/compare-reference

faults: $(DEV)
	$(PY) tools/faults.py kills --count 300
	$(PY) tools/faults.py kills --count 100 --ranks 2
	$(PY) tools/faults.py disk --count 30
	$(MAKE) hostile

torture: $(DEV)
	OMP_NUM_THREADS=1 $(PY) tools/torture.py

hostile: $(DEV)
	OMP_NUM_THREADS=1 $(PY) tools/hostile.py

arithmetic: $(DEV)
	$(PY) tools/arithmetic.py

# In an environment of their own: these tools are no part of ours.
audit: $(RUN)
	$(PY) tools/supply.py check
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet --disable-pip-version-check "pip-audit>=2.7" "cyclonedx-bom>=5"
	$(PY) tools/supply.py pins > build/audit/runtime.txt
	build/audit/bin/pip-audit --requirement build/audit/runtime.txt --no-deps --disable-pip
	build/audit/bin/cyclonedx-py requirements build/audit/runtime.txt --pyproject pyproject.toml -o build/audit/sbom.json
	@echo "The bill of materials is in build/audit/sbom.json"

plan-check: $(DEV)
	rm -f nbs/runs/plan.json
	OMP_NUM_THREADS=1 $(PY) tools/check_plan.py

constraints: $(DEV)
	$(PY) tools/freeze.py
	$(PY) tools/supply.py licences

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
.PHONY: help demo test docs lab export notebooks train-reference campaign comparison plan-check faults torture hostile arithmetic audit constraints clean
