# Every target installs what it needs into .venv and .build; nothing is installed anywhere else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests start hundreds of processes: where this is set, each compiles all of our modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo viewer test test-long test-clients check format bench lock clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

$(VENV)/runtime.stamp: requirements/runtime.txt requirements/build.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("DICOM Depot needs Python 3.11 or later; set PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/runtime.txt -r requirements/build.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/dev.stamp: requirements/dev.txt $(VENV)/runtime.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@touch $@

.PHONY: node
node: $(VENV)/dev.stamp
	$(BIN)/python tests/support/install_node_packages.py

.PHONY: ohif
ohif: $(VENV)/dev.stamp
	$(BIN)/python -m tools.ohif

# Debian's orthanc package would start a server of its own: policy-rc.d and the mask keep it from that.
.PHONY: debian-clients
debian-clients:
	@command -v dcmdump >/dev/null && command -v rclone >/dev/null && command -v dciodvfy >/dev/null && \
	  command -v chromium >/dev/null && \
	  test -x /usr/sbin/Orthanc && test -e /usr/share/orthanc/plugins/libOrthancDicomWeb.so || { \
	  if test -d /run/systemd/system && ! test -x /usr/sbin/Orthanc && ! test -e /etc/systemd/system/orthanc.service; then \
	    ln -s /dev/null /etc/systemd/system/orthanc.service; fi; \
	  ours=; if ! test -e /usr/sbin/policy-rc.d; then ours=1; \
	    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; fi; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    dcmtk rclone orthanc orthanc-dicomweb dicom3tools chromium; status=$$?; \
	  if test -n "$$ours"; then rm -f /usr/sbin/policy-rc.d; fi; exit $$status; }

demo: $(VENV)/runtime.stamp ## Import synthetic DICOM files, export them through the API, show the result
	$(BIN)/dicom-depot demo

viewer: $(VENV)/dev.stamp ohif ## Look at images in the OHIF viewer; FILES="~/scans" adds your own
	$(BIN)/python -m tools.viewer $(FILES)

test: $(VENV)/dev.stamp node ## Run all tests, against real servers that they start themselves
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long and not clients"

test-long: $(VENV)/dev.stamp node ## Run the tests that take minutes
	$(BIN)/python -m pytest -m long

test-clients: $(VENV)/dev.stamp node ohif debian-clients ## Third-party clients, most of them from Debian (needs root)
	$(BIN)/python -m pytest tests/clients -m clients

check: $(VENV)/dev.stamp ## Lint, types, layers
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/dev.stamp ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix --quiet .

bench: $(VENV)/dev.stamp ## Measure the export engine side by side with its peers
	$(BIN)/python benchmarks/run.py

.PHONY: bench-dicomweb
bench-dicomweb: $(VENV)/dev.stamp debian-clients ## Measure the DICOMweb routes side by side with Orthanc (needs root)
	$(BIN)/python -m benchmarks.dicomweb
	$(BIN)/python -m benchmarks.search

lock: $(VENV)/dev.stamp ## Renew the locked dependencies
	$(BIN)/pip-compile --quiet --strip-extras --generate-hashes --no-emit-index-url --no-emit-find-links \
	  --no-emit-trusted-host --allow-unsafe --output-file requirements/runtime.txt pyproject.toml
	$(BIN)/pip-compile --quiet --strip-extras --extra dev --generate-hashes --no-emit-index-url --no-emit-find-links \
	  --no-emit-trusted-host --allow-unsafe -c requirements/runtime.txt --output-file requirements/dev.txt pyproject.toml
	$(BIN)/pip-compile --quiet --strip-extras --generate-hashes --no-emit-index-url --no-emit-find-links \
	  --no-emit-trusted-host --allow-unsafe --build-deps-for editable --only-build-deps \
	  --output-file requirements/build.txt pyproject.toml

clean: ## Remove what the targets installed
	rm -rf $(VENV) .build
