# make help lists what there is.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test lint up down status ui profile extractor

help: ## What there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: .venv/installed ## The tested set of packages, in .venv

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,servers]'
	@touch $@

demo: install ## Train, score and register a small model on this machine, in about six minutes
	@$(BIN)/python -m flows.demo

test: install ## All tests that need no network
	$(BIN)/python -m pytest

lint: install ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

up: install ## Prefect server, MLflow server and worker here, with the deployments registered
	@$(BIN)/python infra/stack.py up

down: install ## Stop what make up started
	@$(BIN)/python infra/stack.py down

status: install ## What of it is running
	@$(BIN)/python infra/stack.py status

ui: install ## MLflow's pages on what make demo left, at http://127.0.0.1:5000
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --host 127.0.0.1 \
		--port $(or $(MLFLOW_PORT),5000) --workers 1 --backend-store-uri sqlite:///$(CURDIR)/var/mlflow/mlflow.db \
		--default-artifact-root file://$(CURDIR)/var/mlflow/artifacts --no-serve-artifacts

profile: install ## Add a Prefect profile train-diffusion to your home, so that the commands work from any folder
	@$(BIN)/python infra/profile.py

extractor: install ## Train the feature extractor that the package ships (20 minutes on 2 cores)
	$(BIN)/python -m diffusion.evaluation.train_extractor --archive $${EUROSAT_ARCHIVE:?set it to the EuroSAT zip}
