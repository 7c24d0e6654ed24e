# `make help` lists the targets. SEED, COUNT and SECONDS are for the campaigns.
SEED ?= 1
COUNT ?=
SECONDS ?= 60
PYTHON = .venv/bin/python
PYTEST = .venv/bin/pytest
# For `make install`.
PREFIX ?= /usr/local
DESTDIR ?=
INTERPRETER ?= /usr/bin/python3
INSTALL = $(INTERPRETER) scripts/install.py --prefix "$(PREFIX)" --destdir "$(DESTDIR)" --bundle build/bundle
RIG = tests/rig/rig run --project

.DEFAULT_GOAL = help
.PHONY: help install uninstall bundle deb test-deb setup lint format test test-all test-unit test-kvm test-guest test-matrix demo soak soak-guests soak-state soak-fleet fuzz installed installer captures bench clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

install: ## Install the programs below PREFIX (/usr/local), in DESTDIR if that is given
	@$(INSTALL)

uninstall: ## Remove what `make install` has installed there
	@$(INSTALL) --uninstall

bundle: ## Download the dependencies that INTERPRETER lacks, for `make install` to install too
	@$(INTERPRETER) scripts/dependencies.py bundle build/bundle

deb: ## Build the Debian package into dist/
	@/usr/bin/python3 scripts/deb.py

setup: ## Install what the targets below need (packages as root, then .venv)
	@scripts/setup.sh

lint: setup ## ruff and mypy
	@scripts/test.sh lint

format: setup ## Format the code in place
	.venv/bin/ruff format
	.venv/bin/ruff check --fix

test: setup ## Run all checks that a change must pass before it is merged
	@scripts/test.sh lint unit kvm core

test-all: setup ## The same with every guest test, then Debian 12, 13 and testing; takes hours
	@status=0; scripts/test.sh lint unit kvm guest || status=1; \
	    scripts/matrix.sh || status=1; exit $$status

test-unit: setup ## Run the tests that need nothing
	@scripts/test.sh unit

test-kvm: setup ## Run the tests that need any /dev/kvm
	@scripts/test.sh kvm

test-guest: setup ## Run every test with distribution kernels: on this machine's KVM, or in the rig
	@scripts/test.sh guest

test-matrix: setup ## Run the unit and kvm groups in trees of Debian 12, 13 and testing, as root
	@scripts/matrix.sh

test-deb: setup ## Build the Debian package, install and purge it, and try pipx, in a fresh Debian 13
	VMD_REQUIRE=kvm,root $(PYTEST) -q tests/packages/check_deb.py

demo: setup ## Boot the self-test guest and a Debian kernel, visibly
	@$(PYTHON) scripts/demo.py

soak: setup ## Kill COUNT (200) guests, 300 writers, device processes and VMs, and flood; SEED repeats a run
	$(PYTHON) tests/campaigns/kill_selftest.py --count $(or $(COUNT),200) --seed $(SEED)
	$(PYTHON) tests/campaigns/kill_disk.py --count $(or $(COUNT),300) --seed $(SEED)
	$(PYTHON) tests/campaigns/kill_device_process.py --count $(or $(COUNT),300) --seed $(SEED)
	$(PYTHON) tests/campaigns/kill_daemon.py --count $(or $(COUNT),50) --seed $(SEED)
	$(PYTHON) tests/campaigns/reload_storm.py --count $(or $(COUNT),100)
	$(PYTHON) tests/campaigns/kill_networks.py --count $(or $(COUNT),2200) --seed $(SEED)
	$(PYTHON) tests/campaigns/kill_vm.py --count $(or $(COUNT),300) --seed $(SEED)
	$(PYTHON) tests/campaigns/kill_send.py --count $(or $(COUNT),100) --seed $(SEED)
	$(PYTHON) tests/campaigns/kill_migrate.py --count $(or $(COUNT),100) --seed $(SEED)
	$(PYTHON) tests/campaigns/kill_clone.py --count $(or $(COUNT),100) --seed $(SEED)
	$(PYTHON) tests/campaigns/kill_snapshot.py --count $(or $(COUNT),100) --seed $(SEED)
	$(PYTHON) tests/campaigns/valid_floods.py
	$(PYTHON) tests/campaigns/save_restore.py --count $(or $(COUNT),1000) --seed $(SEED)
	$(PYTHON) tests/campaigns/agent_load.py --count $(or $(COUNT),1000)

soak-guests: setup ## Kill processes that move Linux guests' frames, COUNT (3) times on each data path; in the rig
	$(RIG) --cpus 1 --timeout 3600 -- $(PYTHON) tests/campaigns/kill_guests.py --count $(or $(COUNT),3)

soak-state: setup ## Write Linux guests under load COUNT (100) times, and let them go on elsewhere; in the rig
	$(RIG) --cpus 1 --mem 4096 --timeout 14400 -- $(PYTHON) tests/campaigns/linux_state.py \
	    --count $(or $(COUNT),100) --seed $(SEED)
	$(RIG) --cpus 1 --mem 4096 --timeout 14400 -- $(PYTHON) tests/campaigns/linux_migrate.py \
	    --count $(or $(COUNT),100) --seed $(SEED)

soak-fleet: setup ## Have COUNT (200) jobs done on two hosts by Dask, then by Slurm if it is installed, and kill parts of them
	$(PYTHON) tests/campaigns/fleet.py --count $(or $(COUNT),200) --seed $(SEED)
	$(PYTHON) tests/campaigns/fleet_slurm.py --count $(or $(COUNT),200) --seed $(SEED)

fuzz: setup ## Try COUNT corruptions of boot and disk images, hostile guests and peers; SEED repeats a run
	$(PYTHON) -m tests.fuzz.harness --seconds $(SECONDS) --count $(or $(COUNT),1000) --seed $(SEED)
	VMM_FUZZ_COUNT=$(or $(COUNT),1000) VMM_FUZZ_SEED=$(SEED) $(PYTEST) -q -m "not guest" \
	    --timeout 3600 tests/unit/boot
	$(PYTHON) tests/campaigns/hostile_guest.py --seed $(SEED)
	$(PYTHON) tests/campaigns/qcow2_oracle.py --count $(or $(COUNT),1000) --seed $(SEED)
	$(PYTHON) tests/campaigns/corrupt_images.py --count $(or $(COUNT),10000) --seed $(SEED)
	$(PYTHON) tests/campaigns/mutate_configs.py --count $(or $(COUNT),10000) --seed $(SEED)
	$(PYTHON) tests/campaigns/mutate_snapshots.py --count $(or $(COUNT),10000) --seed $(SEED)
	$(PYTHON) tests/campaigns/fuzz_local.py --count $(or $(COUNT),300000) --seed $(SEED)
	$(PYTHON) tests/campaigns/fuzz_agentx.py --count $(or $(COUNT),100000) --seed $(SEED)
	$(PYTHON) tests/campaigns/fuzz_vhost_user.py --count $(or $(COUNT),10000) --seed $(SEED)
	$(PYTHON) tests/campaigns/fuzz_net.py --count $(or $(COUNT),10000) --seed $(SEED)
	$(PYTHON) tests/campaigns/hostile_clients.py --count $(or $(COUNT),100000) --seed $(SEED)
	$(PYTHON) tests/campaigns/compromised.py --count $(or $(COUNT),100) --seed $(SEED)

installed: setup ## Boot Debian from disks of every kind, and verify them by fio; in the rig
	$(PYTHON) -m tests.debian
	$(RIG) --cpus 1 --timeout 3600 -- $(PYTHON) tests/campaigns/installed.py

installer: setup ## Partition a disk by Debian's installer, with our network and mirror; in the rig
	$(PYTHON) -m tests.installer
	$(RIG) --cpus 1 --timeout 1800 -- $(PYTHON) tests/campaigns/installer.py

captures: setup ## Compare captures of guests' traffic inside and outside, 1 GiB on each path; in the rig
	$(RIG) --cpus 1 --mem 4096 --timeout 6000 -- $(PYTHON) tests/campaigns/captures.py

bench: setup ## Measure the daemon here, and the start of a guest and disks in the rig, against QEMU
	$(PYTHON) -m bench.daemon
	$(PYTHON) bench/boot.py
	$(PYTHON) bench/net.py
	$(PYTHON) bench/disk.py

clean: ## Remove the targets' files in this directory
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
