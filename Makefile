# For GNU make. Parsing this file runs no command.
PYTHON ?= python3
ARGS ?=

.PHONY: help run test lint types coverage check bench soak zipapp clean

help: ## list these targets
	@echo 'make TARGET [PYTHON=python3] [ARGS="..."]'
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile

run: ## start the server: make run ARGS="-p 1080"
	$(PYTHON) socks5_server.py $(ARGS)

test: ## run the tests: make test ARGS="-v -p test_messages.py"
	$(PYTHON) -m tests $(ARGS)

lint: need-flake8 ## check the style with flake8
	$(PYTHON) -m flake8 socks5 socks5_server.py tests

types: need-mypy ## check the types with mypy
	$(PYTHON) -m mypy

coverage: need-coverage ## run the tests and list the lines of socks5/ that no test reaches
	$(PYTHON) -m coverage erase
	$(PYTHON) -m coverage run -m unittest discover -s tests -t . $(ARGS)
	$(PYTHON) -m coverage combine --quiet
	$(PYTHON) -m coverage report

check: lint types coverage ## run lint, types and coverage (which runs the tests) before a commit

bench: ## measure speed and memory
	$(PYTHON) tests/bench.py $(ARGS)

soak: ## run everything at once for minutes, and look for what is lost: make soak ARGS="--seconds 600"
	$(PYTHON) -m tests.soak $(ARGS)

# The same bytes from the same tree: files in order, dated SOURCE_DATE_EPOCH, or 1980, the first year that zip knows.
zipapp: ## build dist/socks5_server.pyz, the whole server as one file
	rm -rf build/zipapp
	mkdir -p build/zipapp dist
	cp -R socks5 build/zipapp/
	find build/zipapp -name __pycache__ -prune -exec rm -rf {} +
	cp socks5_server.py build/zipapp/__main__.py
	cp LICENSE build/zipapp/
	find build/zipapp -exec chmod u=rwX,go=rX {} +
	$(PYTHON) -c 'import os, pathlib; t = max(int(os.environ.get("SOURCE_DATE_EPOCH") or 0), 315532800); \
	  [os.utime(str(path), (t, t)) for path in pathlib.Path("build/zipapp").rglob("*")]'
	cd build/zipapp && TZ=UTC0 $(PYTHON) -m zipfile -c ../socks5_server.zip LICENSE __main__.py socks5
	$(PYTHON) -m zipapp --python '/usr/bin/env python3' --output dist/socks5_server.pyz build/socks5_server.zip
	chmod 755 dist/socks5_server.pyz

clean: ## remove what the other targets made
	rm -rf build dist htmlcov .mypy_cache *.egg-info .coverage .coverage.*
	find . -name __pycache__ -prune -exec rm -rf {} +

# The development tools are not part of the project: name a missing one, and the command that installs them.
need-%:
	@$(PYTHON) -c 'import $*' 2>/dev/null || { \
	  echo '$* is missing for PYTHON=$(PYTHON): python3 -m venv DIR && DIR/bin/pip install flake8 mypy coverage' \
	       '&& make $(MAKECMDGOALS) PYTHON=DIR/bin/python' >&2; exit 1; }
