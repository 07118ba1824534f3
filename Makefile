VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
PEER = runs/peer

.PHONY: demo test test-slow test-lab test-gpu wheels bench critics docs notebooks readme badges clean

demo: $(READY)
	$(BIN)/rlhf-nb demo $(ARGS)

test: $(READY)
	$(BIN)/ruff check -q .
	$(BIN)/python -m pytest -q tests/test_in_step.py
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(BIN)/python tests/gpu/run.py -q -n 2 --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests

test-slow: $(VENV)/.lab
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --flags slow
	$(BIN)/python tests/gpu/run.py -q --slow
	$(BIN)/python -m pytest -q tests --slow

test-lab: $(VENV)/.lab
	$(BIN)/python -m pytest -q tests/test_lab.py --slow

test-gpu: $(READY)
	$(BIN)/python bench/gpu.py runs/gpu $(ARGS)

wheels: $(READY)
	$(BIN)/python tools/wheels.py .whl $(ARGS)

$(VENV)/.lab: $(READY) tests/lab.txt
	$(BIN)/python -m pip install -q -c constraints.txt -r tests/lab.txt
	touch $@

bench: $(READY) $(PEER)/.ready
	$(BIN)/python bench/run.py runs/bench $(PEER)/bin/python bench/results.json $(ARGS)

$(PEER)/.ready: bench/peer.txt
	python3 -m venv $(PEER)
	$(PEER)/bin/python -m pip install -q -r bench/peer.txt
	touch $@

critics: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python bench/critic.py runs/critic bench/critic.json $(ARGS)

docs: $(VENV)/.docs
	rm -rf runs/docs
	$(BIN)/python docs/pages.py runs/docs/pages
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d runs/docs/doctrees runs/docs/pages runs/docs/html
	rm -rf _docs
	mv runs/docs/html _docs

$(VENV)/.docs: $(READY) docs/requirements.txt
	$(BIN)/python -m pip install -q -c constraints.txt -r docs/requirements.txt
	touch $@

notebooks: $(READY)
	$(BIN)/python tools/notebooks.py $(ARGS)

readme: $(READY)
	$(BIN)/python tools/readme.py

badges: $(READY)
	$(BIN)/python tools/badges.py

$(READY): settings.ini setup.py constraints.txt
	python3 -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist _docs *.egg-info outputs*
