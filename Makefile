# make study: set up, run the quick study offline, say where its report is.   make test: set up, pass every test.
PY := .venv/bin/python
STAMP := .venv/ready

.PHONY: study test setup export check site notebooks base clean
study: setup
	.venv/bin/lora-study run studies/quick.yaml --workers auto || [ $$? -eq 3 ]

test: setup check
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv/bin/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) -m pytest -q -n logical --maxprocesses 4 --dist loadfile tests

setup: $(STAMP)
# torch first and pinned: the pin resolves to one build, a range may fetch several gigabytes of another
$(STAMP): settings.ini setup.py
	test -x $(PY) || $${PYTHON:-python3} -m venv .venv
	$(PY) -m pip install -q torch==2.13.0
	$(PY) -m pip install -q -e '.[dev]'
	touch $@

# notebooks are the source: modules, README and the packaged point notebook are made from them
export: setup
	.venv/bin/nbdev_export
	.venv/bin/nbdev_clean
	$(PY) -m lora_study.pages
	$(PY) -m lora_study.site --write

check: setup
	$(PY) tests/in_step.py

# what a reader of the site would stumble over
site: setup
	$(PY) -m lora_study.site

# run every library notebook and keep its outputs
notebooks: setup
	$(PY) -m lora_study.pages --run nbs/[01234]*.ipynb nbs/5[1-9]*.ipynb nbs/70*.ipynb nbs/index.ipynb
	.venv/bin/nbdev_clean

# pretrain the embedded base anew: about half an hour on two cores
base: setup
	$(PY) -c "from lora_study.pretrain import build_base; build_base('lora_study/embedded')"

clean:
	rm -rf .venv build dist *.egg-info results/*/runs results/study.db*
