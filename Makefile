# `make repro` runs the pipeline, `make test` checks the project; both set up .venv first and are quick the second time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := repro
.PHONY: repro test test-slow lint setup serving

repro: $(VENV)/.installed
	@$(BIN)/python -m preflight.mend
	@$(BIN)/python -m preflight.check params
	@$(BIN)/dvc repro
	@sed '/^## /,$$d' metrics/report.md

setup: $(VENV)/.installed

serving: $(VENV)/.installed-serving

test: lint
	@$(BIN)/python -m pytest

test-slow: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/zizmor --offline --quiet --persona pedantic .github
	@$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/check-jsonschema --builtin-schema vendor.gitlab-ci .gitlab-ci.yml
	@$(BIN)/hadolint Dockerfile

# The .pth file does what activating the environment would do: stages run as `python -m stages.NAME`, and that must be
# this environment's Python whether `dvc repro` is started as .venv/bin/dvc, by an editor or by a queued experiment.
$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: $(PYTHON) is Python %d.%d; this needs 3.11 or newer: make PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --requirement requirements.txt
	@$(BIN)/python -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "path_of_this_environment.pth").write_text("import os, sys; b = os.path.join(sys.prefix, \"bin\"); p = os.environ.get(\"PATH\", os.defpath); os.environ[\"PATH\"] = p if p.split(os.pathsep)[0] == b else b + os.pathsep + p\n")'
	@touch $@

$(VENV)/.installed-serving: $(VENV)/.installed serving/requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --requirement serving/requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-serving requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check --requirement requirements-dev.txt
	@touch $@
