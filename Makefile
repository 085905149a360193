# make help lists what there is.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install ray lock audit demo check test faults containers soak soak-nights docs lint up down service no-service status env clean settings password secrets profile reproduce extractor

help: ## What there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

# Set by many container images: each process would then read torch's sources anew, which takes three seconds.
unexport PYTHONDONTWRITEBYTECODE

# Processes that tests run on, side by side.
WORKERS := 4

install: .venv/installed ## What users need, in .venv: wheels whose hashes are known, and nothing else

# No resolution: the locks are complete. Where no GPU is and pip's indexes have it, torch comes in its build without CUDA.
WHEELS := install --quiet --disable-pip-version-check --no-compile --require-hashes --only-binary :all: --no-deps
.venv/installed: pyproject.toml requirements.lock requirements-torch.lock requirements-torch-cpu.lock | var
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11"'
	@echo "Installing the packages into .venv: one to three minutes"
	@test -d .venv || $(PYTHON) -m venv .venv
	@infra/moving.sh "Packages" $(BIN)/python -m pip $(WHEELS) -r requirements.lock
	@(! command -v nvidia-smi >/dev/null && infra/moving.sh "torch, without CUDA if it is to be had" \
	  sh -c '$(BIN)/python -m pip $(WHEELS) -r requirements-torch-cpu.lock 2>/dev/null') || \
	  infra/moving.sh "torch" $(BIN)/python -m pip $(WHEELS) -r requirements-torch.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# Private from the start; and Prefect, which makes its folder in it, says so of each command where it can't.
var:
	@mkdir -m 700 $@

# And what jobs on a cluster need.
.venv/installed-ray: .venv/installed requirements-ray.lock
	@$(BIN)/python -m pip $(WHEELS) -r requirements-ray.lock
	@touch $@

# And what tests and linters need.
.venv/installed-dev: .venv/installed-ray requirements-dev.lock
	@$(BIN)/python -m pip $(WHEELS) -r requirements-dev.lock
	@touch $@

ray: .venv/installed-ray ## And Ray: what jobs on a cluster need, on each of its hosts

lock: .venv/installed-dev ## Write the lock files from constraints.txt and pyproject.toml
	$(BIN)/python infra/make_lock.py

audit: .venv/installed-dev ## Ask a database of vulnerabilities about every package (needs a network)
	$(BIN)/python -m pip_audit --strict --require-hashes --disable-pip -r requirements.lock -r requirements-ray.lock -r requirements-dev.lock -r requirements-torch.lock

demo: install ## Train, score and register a small model on this machine, in five to ten minutes
	@$(BIN)/python -m flows.commands.demo

check: lint ## Style, types and unit tests: whether a change holds, within a minute or two
	$(BIN)/python -m pytest -q -n $(WORKERS) tests/unit

test: .venv/installed-dev ## All tests but those that kill; none needs a network. FAULTS=1: as CI, with most of those side by side
	$(BIN)/python -m pytest -n $(WORKERS) $(if $(filter 1,$(FAULTS)),-m "not long",--ignore=tests/faults) --ignore=tests/containers

faults: .venv/installed-dev ## Kill, cut and corrupt at recorded moments; the result must be the same
	$(BIN)/python -m pytest -n $(WORKERS) tests/faults

containers: .venv/installed-dev ## infra/compose.yaml for real: a training outlives the death of each container (needs docker compose)
	$(BIN)/python -m pytest -s tests/containers

soak: .venv/installed-dev ## Kill trainings N times at random moments; make soak N=200 SEED=1
	SOAK_KILLS=$(or $(N),200) SOAK_SEED=$(or $(SEED),1) $(BIN)/python -m pytest -s tests/faults/test_kills.py

soak-nights: .venv/installed-dev ## Night after night with kills, and clean-ups; make soak-nights N=60 SEED=1
	SOAK_NIGHTS=$(or $(N),60) SOAK_SEED=$(or $(SEED),1) $(BIN)/python -m pytest -s tests/faults/test_nights.py

docs: .venv/installed-dev ## The pages as a site, in site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: .venv/installed-dev ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

up: $(if $(filter ray,$(ENGINE)),ray,install) ## Prefect server, MLflow server and worker here, deployments registered; ENGINE=ray: and Ray
	@$(if $(ENGINE),TRAIN_DIFFUSION_ENGINE=$(ENGINE)) $(BIN)/python infra/stack.py up

down: install ## Stop what make up started
	@$(BIN)/python infra/stack.py down

service: install ## Have systemd keep all of make up running, also after a restart of the machine
	@$(BIN)/python infra/service.py install

no-service: install ## Stop it, and have nothing start it again
	@$(BIN)/python infra/service.py remove

status: install ## What of it is running
	@$(BIN)/python infra/stack.py status

settings: install ## Every setting of the environment: value, origin, meaning
	@$(BIN)/python -m diffusion.settings

password: install ## A new password for the servers of make up; all that runs here follows it
	@$(BIN)/python infra/stack.py password

env: install ## What a shell needs to use it all, from any folder: eval "$(make env)"
	@$(BIN)/python infra/stack.py env

clean: install ## Delete what can be made again; models, checkpoints and metrics stay
	@$(BIN)/python infra/stack.py clean

secrets: install ## The secrets of infra/compose.yaml, drawn at random, in infra/.env
	@$(BIN)/python infra/make_secrets.py

profile: install ## Add a Prefect profile train-diffusion to your home, so that the commands work from any folder
	@$(BIN)/python infra/prefect_profile.py

reproduce: install ## Train a model version again and compare the weights; make reproduce VERSION=3, or RUN=<MLflow run id>
	@$(BIN)/python -m flows.commands.reproduce $(if $(RUN),--run $(RUN),--version $(or $(VERSION),$(error VERSION=n or RUN=id is needed))) \
	  $(if $(MODEL),--model $(MODEL)) $(if $(PROCESSES),--processes $(PROCESSES))

extractor: install ## Train the feature extractor that the package ships (20 minutes on 2 cores)
	$(BIN)/python -m diffusion.features.train_shipped --archive $${EUROSAT_ARCHIVE:?set it to the EuroSAT zip}
