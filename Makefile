# zcache: every target first sets up what it needs and is missing, and nothing twice.
#
#   packages (apt) -> .venv (requirements.lock) -> compiled core -> the target
#
# Each step decides by itself whether there is something to do (deploy/*.sh), so it may
# be cut off at any point and simply be started again.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: setup run test lint soak demo bench bench-density reference install uninstall deb clean help \
        run-packages packages bench-packages prometheus venv core strict-core
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

PYTHON := .venv/bin/python

# The server: what builds and runs it, and what swaps onto it.
RUN_PACKAGES := nbdkit nbdkit-plugin-python nbd-client libnbd-bin \
    gcc libc6-dev make pkg-config python3 python3-dev python3-venv \
    liblz4-dev libzstd-dev libxxhash-dev libssl-dev
# The tests: a second kernel that swaps (user-mode-linux), its tools, its network; a terminal.
TEST_PACKAGES := git python3-libnbd libnbd-dev user-mode-linux busybox-static stress-ng iproute2 \
    systemd tmux
# The measurements.  redis-tools holds the server's program too (as redis-check-rdb),
# but no service that would start by itself.
BENCH_PACKAGES := fio nodejs redis-tools

# make run SIZE=8G POOL=2G OPTIONS="allocator=zbud codec=zstd"
SIZE ?= 4G
POOL ?= 20%
OPTIONS ?=
# make install PREFIX=/usr DESTDIR=/tmp/package
PREFIX ?= /usr/local
DESTDIR ?=
# make test TESTS="tests/t1_arena.py -k frames"
TESTS ?= tests
# Bounds a hang that a single test's own limit cannot end.
TEST_LIMIT_S ?= 2520

setup: packages venv core ## install what is missing: Debian packages, .venv, compiled core

run: run-packages venv core ## serve a swap device; SIZE=4G POOL=20% OPTIONS="key=value ..."
	@deploy/run.sh 'size=$(SIZE)' 'pool=$(POOL)' $(OPTIONS)

test: lint prometheus ## check the sources, then run every test; TESTS="..." for some of them
	timeout --foreground -k 10 $(TEST_LIMIT_S) $(PYTHON) -m pytest $(TESTS)

lint: packages venv strict-core ## format, style, types, and the C compiler's warnings as errors
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy $(wildcard zcache_core cluster plugin bench tests)

soak: setup prometheus ## the long tests: many minutes
	$(PYTHON) -m pytest -m soak $(TESTS)

demo: setup ## watch a small Linux swap onto the server, from boot to summary
	$(PYTHON) -m tests.swaplab.demo

bench: setup bench-packages ## measure side by side with other systems; table, JSON, plot
	$(PYTHON) -m bench

bench-density: setup bench-packages ## pages per byte of RAM: every allocator, beside kernel zram
	$(PYTHON) -m bench.density

reference: setup ## write the reference and man pages anew, from the code
	$(PYTHON) -m plugin.writepages

install: run-packages venv core ## install below PREFIX=/usr/local (DESTDIR= for packagers), with systemd units
	@DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' deploy/install.sh install

uninstall: ## take away what install put there; /etc/zcache stays
	@DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' deploy/install.sh uninstall

deb: run-packages venv core ## make a Debian package in build/
	@deploy/deb.sh

clean: ## remove everything that setup and tests made, but no Debian package
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find zcache_core cluster plugin bench tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	rm -f zcache_core/*.so zcache_core/*.c cluster/*.so cluster/*.c zcache_core/counter_ids.pxd plugin/zcache-relay

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

run-packages:
	@deploy/packages.sh $(RUN_PACKAGES)

packages:
	@deploy/packages.sh $(RUN_PACKAGES) $(TEST_PACKAGES)

bench-packages:
	@deploy/packages.sh $(BENCH_PACKAGES)

# Unpacked, not installed: its package would start a service.
prometheus: packages
	@deploy/unpack.sh prometheus etcd-server

venv:
	@deploy/venv.sh

core: venv
	@deploy/core.sh

strict-core: venv
	@deploy/core.sh strict
