VENV ?= .venv
PY = $(VENV)/bin/python
READY = $(VENV)/.ready
TORCH_HOME_OFFLINE = HF_HUB_OFFLINE=1

.PHONY: demo test test-slow clean

demo: $(READY)
	$(PY) -m rlhf_nb.cli demo $(ARGS)

test: $(READY)
	$(PY) -m pytest -q tests/test_in_step.py
	$(VENV)/bin/nbdev_test --n_workers 2 --timing
	$(PY) -m pytest -q tests

test-slow: $(READY)
	$(VENV)/bin/nbdev_test --n_workers 2 --flags slow
	$(PY) -m pytest -q tests --slow

readme: $(READY)
	$(PY) tests/readme.py

$(READY): settings.ini setup.py constraints.txt
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info outputs*
