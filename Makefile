# Everything that is done to this repository from the command line. CI runs "make verify test", see .ci/run.

GO ?= go
# Go programs of the toolchain are run at these versions and installed nowhere but here.
TOOLS := $(CURDIR)/.tools
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
PROTOC_GEN_GO := google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
PROTOC_GEN_GO_GRPC := google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2
PROTOS := $(sort $(shell find proto -name '*.proto'))

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)

.PHONY: build test demo bench bench-clone stress chaos soak faults sim model screenshots verify generate generate-check fmt-check tidy-check

build:
	$(GO) build -trimpath -ldflags '-X main.version=$(VERSION)' -o bin/quorate ./cmd/quorate

# Many packages start PostgreSQL servers of their own. More of them at once than processors, and they only wait for
# each other, until time limits inside the tests are missed. Nothing from Go's cache: tests that build and run the command
# depend on code that the cache does not know they depend on. The longest comes early, so that nothing waits for it alone,
# and not first, beside all that has still to be compiled. The race detector has every program wait for a second before it ends,
# for races of that time; hundreds of programs are started here, and each is closed in good order first.
test:
	GORACE=atexit_sleep_ms=0 $(GO) test -race -count=1 -p 2 -timeout 19m ./consensus ./dashboard ./test/cluster ./...

demo: build
	bin/quorate demo

bench: build
	$(GO) run ./test/bench

# A clone of SIZE MiB against a plain copy of the same server, in one run.
SIZE ?= 1024
bench-clone:
	QUORATE_CLONE_MIB=$(SIZE) $(GO) test -run '^$$' -bench Clone -benchtime 5x -timeout 1h ./replication/clone

# The workloads of test/cluster, for as long as the issue asks instead of seconds, a machine with too much to do, and a page
# that is left open. STRESS is the length of each. And clusters that grow from one node to five, have every node replaced and
# shrink to three: in peace, and with nodes killed at random moments, the same ones for the same SEED.
STRESS ?= 60s
stress:
	QUORATE_STRESS=$(STRESS) QUORATE_SEED=$(SEED) $(GO) test -count=1 -p 1 -timeout 2h -v -run 'TestStress|TestRecoveryFullDisks|TestRecoveryAttached|TestGrow|TestSetBack|TestAwayForTooLong' ./test/cluster ./test/control ./test/dashboard

# A cluster under load, broken in every way that test/faults knows, for as long as DURATION. The same SEED breaks the same
# things at the same times; without one it is drawn. Root has faults of the network too.
DURATION ?= 1m
chaos:
	$(GO) run ./test/chaos $(if $(SEED),-seed $(SEED)) -duration $(DURATION)

# What takes too long for every run: done before a release. A page that grows is found in ten minutes, not in one.
soak:
	$(MAKE) stress
	QUORATE_STRESS=10m $(GO) test -count=1 -timeout 30m -v -run TestStressPage ./test/dashboard
	$(MAKE) sim SIM=10m
	$(MAKE) chaos DURATION=30m

# How long each fault keeps clients from committing: the table in docs/faults.md.
ROUNDS ?= 5
faults:
	$(GO) run ./test/chaos -measure $(ROUNDS)

# The commit protocol in simulated time, with crashes at every step; see test/sim. SIM is how long.
SIM ?= 1m
sim:
	QUORATE_SIM=$(SIM) $(GO) test -count=1 -timeout 24h -v ./test/sim

# The commit protocol and recovery, checked exhaustively; see model/README.md. It needs Debian's spin.
model:
	model/check.sh

# The pictures of the dashboard in docs/img, of a cluster that is started for them. It takes four minutes.
screenshots:
	QUORATE_SCREENSHOTS=$(CURDIR)/docs/img $(GO) test -count=1 -timeout 20m -v -run TestScreenshots ./test/dashboard

verify: fmt-check generate-check tidy-check
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...
	$(GO) test ./internal/layout

fmt-check:
	@out=$$(gofmt -l $$(git ls-files -co --exclude-standard '*.go')); \
	if [ -n "$$out" ]; then echo "gofmt these files:"; echo "$$out"; exit 1; fi

tidy-check:
	$(GO) mod tidy -diff

$(TOOLS)/protoc-gen-go: Makefile
	GOBIN=$(TOOLS) $(GO) install $(PROTOC_GEN_GO)

$(TOOLS)/protoc-gen-go-grpc: Makefile
	GOBIN=$(TOOLS) $(GO) install $(PROTOC_GEN_GO_GRPC)

# $(call protoc,DIR) writes the generated code under DIR.
define protoc
	@command -v protoc >/dev/null || { echo "protoc is missing: apt-get install protobuf-compiler"; exit 1; }
	PATH="$(TOOLS):$$PATH" protoc -I proto \
		--go_out=$(1) --go_opt=module=github.com/quorate/quorate \
		--go-grpc_out=$(1) --go-grpc_opt=module=github.com/quorate/quorate $(PROTOS)
endef

generate: $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-go-grpc
	$(call protoc,.)

# The version of protoc, which generated code mentions, is Debian's choice and not ours.
generate-check: $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-go-grpc
	@rm -rf $(TOOLS)/generated && mkdir -p $(TOOLS)/generated
	$(call protoc,$(TOOLS)/generated)
	@cd $(TOOLS)/generated && for f in $$(find proto -name '*.pb.go'); do \
		diff -u -I '^//.*protoc  *v' $(CURDIR)/$$f $$f || { echo "$$f is out of date: make generate"; exit 1; }; done
	@for f in $$(find proto -name '*.pb.go'); do \
		test -e $(TOOLS)/generated/$$f || { echo "$$f is generated from nothing: remove it"; exit 1; }; done
