# phaul-runtime: everything from a fresh Debian machine.
#
#   make demo    move a process that dirties its memory from host a to host b
#   make test    lint, types, and tests, unit to e2e, in about 40 minutes; make test PARTS="lint unit"
#   make test-all  the same with those that go another way through the same
#   make table   every engine in every mode in every laboratory: moved, or refused by name
#   make faults  every fault at every moment; make faults-random SEED=1 COUNT=100;
#                ENGINE=runc or docker for containers, MODE=pre-copy or post-copy for one of both
#   make fuzz    a million mutated messages; ONLY=pages SEED=1 CASE=7 repeats one
#   make lab KIND=native SUITE=forky     hosts to work with; both words may be left out
#   make bench-service  another client's moves while many connect, open and are slow
#   make bench   downtime beside other ways to move (METHODS=, WORKLOADS=, RUNS=)
#
# The laboratory (hosts of namespaces and emulated ones, tests/lab) needs root, about 6 GiB of disk
# for each suite of software under ~/.cache/phaul-runtime-lab and a few minutes for its image.

VENV := .venv
PYTHON := $(VENV)/bin/python
LAB := tests/lab/lab
APT := qemu-system-x86 qemu-utils mmdebstrap openssh-client e2fsprogs iproute2 rsync acl gcc libc6-dev make python3-venv

# Where it is set, each start of an interpreter compiles our sources anew.
unexport PYTHONDONTWRITEBYTECODE

all: test

# -- set-up ------------------------------------------------------------------------------

system: .venv/.system
.venv/.system: Makefile
	@mkdir -p $(VENV)
	@missing=; for p in $(APT); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then echo "installing$$missing"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends $$missing >/dev/null || exit 1; fi
	@touch $@

venv: .venv/.ready
.venv/.ready: .venv/.system setup.cfg pyproject.toml
	@echo "setting up $(VENV)"
	@python3 -I -m venv $(VENV)
	@$(PYTHON) -I -m pip install -q -e '.[dev]'
	@touch $@

# KIND=native or emulated: hosts of namespaces or machines; by default what this kernel can do.
KIND :=
SUITE :=
lab: venv
	@$(LAB) up $(if $(KIND),--$(KIND)) --suite "$(SUITE)"
	@$(LAB) status

# -- what it is for ----------------------------------------------------------------------

demo: lab
	@sh tests/lab/demo.sh

# -- tests -------------------------------------------------------------------------------

PARTS :=
test: venv
	@$(PYTHON) -m tests.parts $(PARTS)

test-all: export THOROUGH = 1
test-all: test

lint unit unit-forky e2e-native e2e-emulated e2e-emulated-forky: venv
	@$(PYTHON) -m tests.parts $@

# Every engine in every mode, in one laboratory after the other (about an hour).
table: venv
	THOROUGH=1 TABLE=build/tests/table.txt PYTHONPATH=$$($(LAB) pycriu) \
		$(VENV)/bin/pytest tests/e2e/test_table.py --down

# The whole table of faults and moments (about 40 minutes), and kills at random moments.
ENGINE := process
MODE :=
SEED := 1
COUNT := 100
FAULTS = PYTHONPATH=$(shell $(LAB) pycriu) $(VENV)/bin/pytest tests/e2e/faults

faults: venv
	FAULTS=full ENGINE=$(ENGINE) MODE=$(MODE) $(FAULTS) -k one_copy

faults-random: venv
	SEED=$(SEED) COUNT=$(COUNT) ENGINE=$(ENGINE) MODE=$(MODE) $(FAULTS) -k random

# A million mutated messages and files, in half an hour to an hour; not in CI, which has some
# thousand. A finding says how it is repeated: ONLY=pages SEED=1 CASE=7.
ONLY :=
MESSAGES := 1000000
fuzz: export PYTHONPATH = $(shell $(LAB) pycriu)
fuzz: venv
	$(PYTHON) -m tests.fuzz --messages $(MESSAGES) $(if $(ONLY),--only $(ONLY)) \
		$(if $(filter command line,$(origin SEED)),--seed $(SEED)) $(if $(CASE),--case $(CASE))

# Moves side by side with other ways (tests/bench/README.md), about an hour; RESUME=1 goes on with
# what was interrupted. matplotlib and the driver of the Go library are needed for this only.
RUNS := 3
METHODS :=
WORKLOADS :=
RESUME :=
OUT := build/bench/benchmarks.json
BENCH = PYTHONPATH=tests/lab $(PYTHON) -m tests.bench

bench: export KIND = emulated
bench: lab build/bench/phaul-go $(VENV)/.bench
	$(BENCH) --runs $(RUNS) --methods "$(METHODS)" --workloads "$(WORKLOADS)" --out $(OUT) \
		$(if $(RESUME),--resume)

bench-docker:
	$(MAKE) bench METHODS=phaul-docker-lazy,phaul-docker,docker,podman-pre,podman,phaul-runc \
		WORKLOADS=64-6.25 OUT=build/bench/docker.json

MOVES :=
# What 1,000 silent connections, 500 open migrations and a slow Open cost another client.
bench-service: venv
	PYTHONPATH=$$($(LAB) pycriu) $(PYTHON) -m tests.bench.service $(if $(MOVES),--moves $(MOVES))

# docs/config.md, docs/commands.md and docs/errors.md are made of the code.
docs: venv
	$(PYTHON) -m tests.docsgen

# docs/benchmarks.md and its picture are what the last `make bench` wrote.
bench-docs:
	cp build/bench/benchmarks.md build/bench/benchmarks.svg docs/

build/bench/phaul-go: tests/bench/go/main.go tests/bench/go/build.sh .venv/.system
	@echo "building $@"
	@sh tests/bench/go/build.sh $@

$(VENV)/.bench: .venv/.ready
	@$(PYTHON) -I -m pip install -q -e '.[bench]'
	@touch $@

# -- the rest ----------------------------------------------------------------------------

proto: venv
	$(PYTHON) -I -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. \
		phaul_runtime/rpc/phaul.proto

down:
	@$(LAB) down

clean: down
	rm -rf $(VENV) build dist *.egg-info

.PHONY: all system venv lab demo test test-all lint unit unit-forky e2e-native e2e-emulated \
	e2e-emulated-forky table faults faults-random fuzz bench bench-docker \
	bench-service bench-docs docs proto down clean
