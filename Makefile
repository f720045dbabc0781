# make setup | demo | demo-ci | test | test-all | test-oldest | test-slurm | soak | lint | lint-manifests
#      docs | lock
# Everything is installed into VENV, a folder of this clone; LOCK=/dev/null takes the newest versions.

VENV ?= .venv
OLDEST ?= .venv-oldest
MANIFESTS ?= .venv-manifests
DOCS ?= .venv-docs
LOCK ?= requirements/lock.txt
EXTRAS = dali,deepspeed,demo,dev,hf,onnx,parquet,stores
comma = ,
PYTHON = $(VENV)/bin/python

# uv where there is one that runs, else a private one brought by pip.
FIND_UV = UV="$$(command -v uv || true)"; \
	if [ -z "$$UV" ] || ! "$$UV" --version >/dev/null 2>&1; then \
		UV=.venv-uv/bin/uv; \
		[ -x "$$UV" ] || python3 -m pip install --quiet --target .venv-uv uv; \
	fi

.PHONY: setup demo demo-ci test test-all test-oldest test-slurm soak lint lint-manifests docs lock

setup: $(VENV)/.stamp

$(VENV)/.stamp: pyproject.toml $(LOCK)
	@set -eu; $(FIND_UV); \
	[ -x "$(PYTHON)" ] || "$$UV" venv --quiet "$(VENV)"; \
	echo "installing into $(VENV) (some GB at the first time)"; \
	"$$UV" pip install --quiet --compile-bytecode --python "$(PYTHON)" --constraint "$(LOCK)" \
		-e '.[$(EXTRAS)]'
	@touch $@

demo: setup
	$(PYTHON) launchers/demo.py

# The demo's whole path in about a minute, in a folder of its own.
demo-ci: setup
	$(PYTHON) launchers/demo.py --steps 3 --fresh

test: setup
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m 'not slow' -n 2 --dist loadfile

test-all: setup
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile

# The lowest versions that pyproject.toml promises.
$(OLDEST)/.stamp: pyproject.toml
	@set -eu; $(FIND_UV); \
	[ -x "$(OLDEST)/bin/python" ] || "$$UV" venv --quiet --python 3.11 "$(OLDEST)"; \
	"$$UV" pip install --quiet --compile-bytecode --python "$(OLDEST)/bin/python" --resolution lowest-direct \
		-e '.[deepspeed,demo,dev,hf,parquet,stores]'
	@touch $@

test-oldest: $(OLDEST)/.stamp
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -m 'not slow' -n 2 --dist loadfile

# The batch scripts on a real SLURM of two nodes on this machine; Debian: slurm-wlm, munge.
test-slurm: setup
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -rs tests/slurm

# Faults drawn at random for ten minutes; the end must be that of a run without.
soak: setup
	OMP_NUM_THREADS=1 PYTHONPATH=. $(PYTHON) tests/soak.py --minutes 10

# Manifests, Dockerfile, scripts, workflows and forms, against published schemas and rules; no cluster is needed.
$(MANIFESTS)/.stamp: pyproject.toml $(LOCK)
	@set -eu; $(FIND_UV); \
	[ -x "$(MANIFESTS)/bin/python" ] || "$$UV" venv --quiet "$(MANIFESTS)"; \
	"$$UV" pip install --quiet --compile-bytecode --python "$(MANIFESTS)/bin/python" --constraint "$(LOCK)" \
		--group manifests
	@touch $@

CHECK_SCHEMA = $(MANIFESTS)/bin/check-jsonschema --builtin-schema vendor.

lint-manifests: $(MANIFESTS)/.stamp
	$(MANIFESTS)/bin/python tests/manifests/check.py
	$(MANIFESTS)/bin/python -m pytest --noconftest tests/manifests/test_check.py
	$(CHECK_SCHEMA)github-workflows .github/workflows/*.yml
	$(CHECK_SCHEMA)github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(CHECK_SCHEMA)dependabot .github/dependabot.yml
	$(CHECK_SCHEMA)citation-file-format CITATION.cff

# The site of docs/, in build/site.
$(DOCS)/.stamp: pyproject.toml $(LOCK)
	@set -eu; $(FIND_UV); \
	[ -x "$(DOCS)/bin/python" ] || "$$UV" venv --quiet "$(DOCS)"; \
	"$$UV" pip install --quiet --compile-bytecode --python "$(DOCS)/bin/python" --constraint "$(LOCK)" \
		--group docs
	@touch $@

docs: $(DOCS)/.stamp
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict
	$(DOCS)/bin/python tests/site/check_links.py build/site

# Versions and hashes of what make setup, lint-manifests and docs install, for any platform.
lock:
	@set -eu; $(FIND_UV); mkdir -p requirements; \
	"$$UV" pip compile --quiet --universal --python-version 3.11 --generate-hashes --upgrade \
		--no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
		$(foreach extra,$(subst $(comma), ,$(EXTRAS)),--extra $(extra)) --group docs --group manifests \
		--output-file requirements/lock.txt pyproject.toml

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PYTHON)
