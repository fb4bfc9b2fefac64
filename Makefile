# For people and packagers; Cargo does the work.

PREFIX ?= /usr
DESTDIR ?=
# /etc belongs to the system's own prefixes; any other one has its own.
SYSCONFDIR ?= $(if $(filter /usr /usr/local,$(PREFIX)),/etc,$(PREFIX)/etc)

# What to install: the release build unless told otherwise.
PLUGIN ?= target/release/libspank_pyxis.so
EXECUTABLE ?= target/release/pyxis
# What makes manual pages and completions: the executable itself, unless it is for another machine.
GENERATOR ?= $(EXECUTABLE)

plugindir = $(PREFIX)/lib/spank-pyxis
plugin = $(plugindir)/spank_pyxis.so
executable = $(PREFIX)/bin/pyxis
# What hooks for enroot call. An enroot that is still installed keeps its own.
enroot_mount = $(PREFIX)/bin/enroot-mount
config = $(SYSCONFDIR)/pyxis/pyxis.toml
# The plugin knows where it is installed by default; anywhere else it has to be told.
arguments = $(if $(filter /usr,$(PREFIX)),, executable=$(executable) config=$(config))

.PHONY: build
build:
	cargo build --release --locked

# A .deb and a .rpm in target/packages, of a release build of their own.
.PHONY: packages
packages:
	packaging/build

# A Slurm cluster with Pyxis on this machine, to play with.
.PHONY: demo
demo:
	packaging/demo/run

.PHONY: demo-stop
demo-stop:
	$(or $(CARGO_TARGET_DIR),target)/release/testbed down

# All tests. Needs root: they start a real Slurm.
.PHONY: test
test: prerequisites
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo test --workspace --locked --no-fail-fast
	tests/kernels/run 5.10 6.1
	packaging/fuzz-briefly

.PHONY: prerequisites
prerequisites:
	packaging/prerequisites

# Scripts call enroot: they find pyxis there, unless a real one is.
# Installs beside what is running: files are replaced by renaming, because step managers have the old ones mapped.
.PHONY: install
install: $(PLUGIN) $(EXECUTABLE)
	install -d -m 0755 $(DESTDIR)$(plugindir) $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/pyxis
	install -d -m 0755 $(DESTDIR)$(dir $(config))
	install -m 0644 $(PLUGIN) $(DESTDIR)$(plugin).new
	mv -f $(DESTDIR)$(plugin).new $(DESTDIR)$(plugin)
	install -m 0755 $(EXECUTABLE) $(DESTDIR)$(executable).new
	mv -f $(DESTDIR)$(executable).new $(DESTDIR)$(executable)
	test -e $(DESTDIR)$(PREFIX)/bin/enroot || ln -s pyxis $(DESTDIR)$(PREFIX)/bin/enroot
	test -e $(DESTDIR)$(enroot_mount) || ln -sfn pyxis $(DESTDIR)$(enroot_mount)
	sed -n 's|^required .*|required $(plugin)$(arguments)|p' plugstack.conf.d/pyxis.conf > $(DESTDIR)$(PREFIX)/share/pyxis/.pyxis.conf.new
	mv -f $(DESTDIR)$(PREFIX)/share/pyxis/.pyxis.conf.new $(DESTDIR)$(PREFIX)/share/pyxis/pyxis.conf
	$(GENERATOR) generate $(DESTDIR)$(PREFIX)/share
	test -e $(DESTDIR)$(config) || install -m 0644 packaging/pyxis.toml $(DESTDIR)$(config)

$(PLUGIN) $(EXECUTABLE):
	@echo "$@ is missing: run 'make build' first" >&2; exit 1
