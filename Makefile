# For GNU make. Parsing this file runs no command.
PYTHON ?= python3
ARGS ?=

.PHONY: help run test lint types coverage check bench zipapp clean

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

zipapp: ## build dist/socks5_server.pyz, the whole server as one file
	rm -rf build/zipapp
	mkdir -p build/zipapp dist
	cp -R socks5 build/zipapp/
	find build/zipapp -name __pycache__ -prune -exec rm -rf {} +
	cp socks5_server.py build/zipapp/__main__.py
	cp LICENSE build/zipapp/
	$(PYTHON) -m zipapp --compress --python '/usr/bin/env python3' --output dist/socks5_server.pyz build/zipapp

clean: ## remove what the other targets made
	rm -rf build dist htmlcov .mypy_cache *.egg-info .coverage .coverage.*
	find . -name __pycache__ -prune -exec rm -rf {} +

# The development tools are not part of the project: name a missing one, and the command that installs them.
need-%:
	@$(PYTHON) -c 'import $*' 2>/dev/null || { \
	  echo '$* is missing for PYTHON=$(PYTHON): python3 -m venv DIR && DIR/bin/pip install flake8 mypy coverage' \
	       '&& make $(MAKECMDGOALS) PYTHON=DIR/bin/python' >&2; exit 1; }
