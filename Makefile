# snifctl: build, try and test. `make help` lists the targets.

PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
CLANG ?= clang
TRIPLET := $(shell uname -m)-linux-gnu

# What the program needs at run time, what its tests and demo need besides, and what looks at its sources.
PACKAGES := clang libbpf-dev bpftool iproute2 ethtool tcpdump
TEST_PACKAGES := tshark wireshark-common tcpreplay socat iputils-ping procps nftables prometheus openssh-client openssh-server
CHECK_PACKAGES := shellcheck clang-format

# Under sudo, cargo is often in the calling user's home only.
export PATH := $(PATH):$(if $(SUDO_USER),$(shell getent passwd $(SUDO_USER) | cut -d: -f6)/.cargo/bin):$(HOME)/.cargo/bin

.PHONY: help build bpf deps demo demo-picture test soak test-kernels test-receivers bench check install deb test-package deploy-tools kustomize test-deploy images test-images clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

build: ## build the release binary
	$(CARGO) build --release --locked

bpf: ## compile the kernel programs by themselves, every warning an error
	@mkdir -p target
	for name in snifctl taps match; do \
		$(CLANG) -O2 -g -Wall -Wextra -Werror -target bpf -mcpu=v3 -I/usr/include/$(TRIPLET) \
			-c bpf/$$name.bpf.c -o target/$$name.bpf.o || exit 1; done

# What is missing of these packages.
define install
missing="$$(for package in $(1); do \
	dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || echo $$package; done)"; \
if [ -n "$$(echo $$missing)" ]; then \
	apt-get update -q && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; fi
endef

deps: ## install what is missing, with apt (needs root)
	@$(call install,$(PACKAGES) $(TEST_PACKAGES) $(if $(shell command -v cc),,gcc) $(if $(shell command -v kubectl),,kubernetes-client))
	@command -v $(CARGO) >/dev/null || { apt-get install -q -y rustup && rustup default stable; } || \
		{ echo "cargo is missing; Rust 1.89 or newer is needed: see https://rustup.rs" >&2; exit 1; }

demo: deps build ## the main job on real traffic, in a sandbox (needs root)
	target/release/snifctl demo

demo-picture: deps build ## docs/demo.svg, from a run of the demo (needs root)
	target/release/snifctl demo > target/demo.txt
	docs/demo.sh < target/demo.txt > docs/demo.svg

# Tests wait for tools and packets a good part of their time.
test: export RUST_TEST_THREADS ?= $(shell expr 2 '*' $$(nproc))
test: deps bpf ## every test, on the real kernel in sandboxes (needs root)
	$(CARGO) test --locked --no-fail-fast

soak: deps bpf ## the full matrices and long runs, half an hour at most (needs root)
	$(CARGO) test --locked --test soak
	SNIFCTL_FUZZ=10000000 $(CARGO) test --locked --bin snifctl no_bytes_whatever
	SNIFCTL_NAMESPACES=1000 $(CARGO) test --locked --test sandbox namespaces::
	SNIFCTL_PODS=100 $(CARGO) test --locked --test sandbox pods::pods_that_come_together

KERNELS ?=
KERNEL_PACKAGES := qemu-system-x86 busybox-static kmod cpio xz-utils zstd wireguard-tools

test-kernels: deps bpf ## the tests in guests with stock kernels; KERNELS="6.1 newest" chooses (needs root and the network)
	@$(call install,$(KERNEL_PACKAGES))
	tests/kernels/run $(KERNELS)

RECEIVERS := suricata
RECEIVER_PACKAGES := mmdebstrap python3

test-receivers: deps ## what sensors see behind the collector, and on the wire (needs root and, once, the network)
	@$(call install,$(RECEIVER_PACKAGES))
	@for name in $(RECEIVERS); do tests/receivers/root $$name target/receivers/$$name || exit 1; done
	$(CARGO) test --locked --test receivers -- --nocapture --test-threads=1

ONLY ?=
ROUNDS ?= 8
BASELINE ?=
BENCH_PACKAGES := gcc libc6-dev gnuplot-nox iperf3

bench: deps ## what copying costs, in sandboxes; ONLY="cost tcp latency commands scale collect" chooses, ROUNDS=n BASELINE=other-snifctl (needs root)
	@$(call install,$(BENCH_PACKAGES))
	$(if $(BASELINE),SNIFCTL_BASELINE=$(abspath $(BASELINE))) $(CARGO) bench --locked --bench bench -- --rounds $(ROUNDS) $(ONLY)

SCRIPTS := .ci/run docs/demo.sh $(wildcard tests/kernels/*) tests/receivers/root tests/package/root tests/images/build $(wildcard packaging/debian/p*) \
	deploy/kustomize/generate tests/deploy/tools
OLDEST_RUST := $(shell sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)

check: deps ## formatting, lints, and a build with the oldest Rust (needs root where something is missing)
	@$(call install,$(CHECK_PACKAGES))
	$(CARGO) fmt --check
	clang-format --dry-run -Werror bpf/*.[ch]
	shellcheck $(SCRIPTS)
	$(CARGO) clippy --all-targets --locked -- -D warnings
	@if ! command -v rustup >/dev/null; then echo "rustup is not there: Rust $(OLDEST_RUST) is not tried"; \
	elif ! rustup run $(OLDEST_RUST) rustc --version >/dev/null 2>&1 && \
		! rustup toolchain install $(OLDEST_RUST) --profile minimal >/dev/null 2>&1; then \
		echo "Rust $(OLDEST_RUST) cannot be fetched: it is not tried"; \
	else rustup run $(OLDEST_RUST) cargo check --locked --target-dir $${CARGO_TARGET_DIR:-target}/oldest-rust; fi

# Man pages, completions, unit and example go where the system looks for them.
SYSCONFDIR ?= /etc
UNITDIR ?= $(PREFIX)/lib/systemd/system
# Debian's zsh looks for packages' completions in a directory of its own.
ZSHDIR ?= $(PREFIX)/share/zsh/site-functions
# Wireshark looks below its own prefix, not ours: there, if it is here.
EXTCAPDIR ?= $(or $(if $(filter /usr,$(PREFIX)),,$(shell tshark -G folders 2>/dev/null | \
	sed -nE 's/^(Global )?Extcap path:[[:space:]]*//p')),$(PREFIX)/lib/$(TRIPLET)/wireshark/extcap)
TARGET := $(or $(CARGO_TARGET_DIR),target)
SNIFCTL := $(TARGET)/release/snifctl

install: build ## install it with manual, completions and systemd unit, under PREFIX (default /usr/local)
	install -D -m 0755 $(SNIFCTL) $(DESTDIR)$(PREFIX)/bin/snifctl
	ln -sf snifctl $(DESTDIR)$(PREFIX)/bin/kubectl-snif
	install -d $(DESTDIR)$(EXTCAPDIR)
	ln -sfr $(DESTDIR)$(PREFIX)/bin/snifctl $(DESTDIR)$(EXTCAPDIR)/snifctl-extcap
	install -d $(DESTDIR)$(PREFIX)/share/man/man1 $(DESTDIR)$(ZSHDIR) $(DESTDIR)$(UNITDIR) \
		$(DESTDIR)$(PREFIX)/share/bash-completion/completions $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	$(SNIFCTL) man $(DESTDIR)$(PREFIX)/share/man/man1
	install -m 0644 packaging/kubectl-snif.1 $(DESTDIR)$(PREFIX)/share/man/man1/kubectl-snif.1
	$(SNIFCTL) completions bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/snifctl
	$(SNIFCTL) completions zsh > $(DESTDIR)$(ZSHDIR)/_snifctl
	$(SNIFCTL) completions fish > $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/snifctl.fish
	sed 's:/usr/bin/snifctl:$(PREFIX)/bin/snifctl:; s:/etc/snifctl.d:$(SYSCONFDIR)/snifctl.d:' packaging/snifctl.service \
		> $(DESTDIR)$(UNITDIR)/snifctl.service
	install -D -m 0644 packaging/example.toml.disabled $(DESTDIR)$(SYSCONFDIR)/snifctl.d/example.toml.disabled

CARGO_DEB := 3.8.0
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
# What `make deb` packs; Cargo.toml names the files.
STAGE := target/package

deb: ## build the Debian package, in target/debian/
	@$(CARGO) deb --version 2>/dev/null | grep -qF $(CARGO_DEB) || $(CARGO) install cargo-deb --locked --version $(CARGO_DEB)
	rm -rf $(STAGE)
	umask 022; $(MAKE) install DESTDIR=$(CURDIR)/$(STAGE) PREFIX=/usr ZSHDIR=/usr/share/zsh/vendor-completions
	printf 'snifctl (%s-1) unstable; urgency=medium\n\n  * See CHANGELOG.md.\n\n -- %s  %s\n' '$(VERSION)' \
		"$$(sed -n 's/^maintainer = "\(.*\)"/\1/p' Cargo.toml)" "$$(date -R)" > $(STAGE)/changelog
	$(CARGO) deb --no-build --locked --output target/debian/

TEST_PACKAGE_PACKAGES := mmdebstrap man-db lintian zsh fish systemd

test-package: deps ## the Debian package: built, installed, upgraded, removed in a fresh root (needs root and the network)
	@$(call install,$(TEST_PACKAGE_PACKAGES))
	$(MAKE) deb
	@# Removing the package takes down every mirror that it can see: it sees those of the test alone.
	unshare --mount --pid --fork --kill-child --mount-proc sh -ec 'mount -t bpf -o mode=0700 bpf /sys/fs/bpf; exec "$$@"' sh \
		$(CARGO) test --locked --test package -- --nocapture --test-threads=1

# helm, kubectl, kubernetes-validate: see tests/deploy/tools.
DEPLOY_TOOLS := target/deploy
DEPLOY_PACKAGES := python3-venv

deploy-tools:
	@$(call install,$(DEPLOY_PACKAGES) $(if $(shell command -v npm),,npm))
	tests/deploy/tools $(DEPLOY_TOOLS)

kustomize: deploy-tools ## the objects below deploy/kustomize, from the templates of the Helm chart
	HELM=$(CURDIR)/$(DEPLOY_TOOLS)/bin/helm deploy/kustomize/generate > $(DEPLOY_TOOLS)/snifctl.yaml
	mv $(DEPLOY_TOOLS)/snifctl.yaml deploy/kustomize/snifctl.yaml
	for one in operator dashboard; do \
		HELM=$(CURDIR)/$(DEPLOY_TOOLS)/bin/helm deploy/kustomize/generate $$one > $(DEPLOY_TOOLS)/$$one.yaml && \
		mv $(DEPLOY_TOOLS)/$$one.yaml deploy/kustomize/components/$$one/$$one.yaml || exit 1; \
	done

test-deploy: deps deploy-tools ## chart, kustomization and kubectl's plugin (needs root and, once, the network)
	$(CARGO) test --locked --test deploy

# What goes into the images; docs/images.md.
KUBECTL ?= $(shell command -v kubectl)
IMAGE_PACKAGES := buildah mmdebstrap

images: deps build ## the container images, on a base made here, in target/images/ (needs root and, once, the network)
	@$(call install,$(IMAGE_PACKAGES))
	install -D $(SNIFCTL) target/images/snifctl
	strip target/images/snifctl
	$(if $(KUBECTL),install $(KUBECTL) target/images/kubectl,@echo "no kubectl is here: snifctl:k8s is not built" >&2)
	tests/images/build target/images

TEST_IMAGE_PACKAGES := runc

test-images: images ## the images in containers, as a DaemonSet's (needs root and, once, the network)
	@$(call install,$(TEST_IMAGE_PACKAGES))
	$(CARGO) test --locked --test images -- --nocapture --test-threads=1

clean: ## remove what was built
	$(CARGO) clean
