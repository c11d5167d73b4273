# make test     a virtual environment, the packages, the linter, all tests

PYTHON ?= python3
VENV = .venv

test: $(VENV)/test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest

$(VENV)/run: requirements.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -r requirements.txt
	touch $@

$(VENV)/test: requirements-test.txt $(VENV)/run
	$(VENV)/bin/python -m pip install -q -r requirements-test.txt
	touch $@

.PHONY: test
