# Each target does one thing a person asks for. The first two are all a new user needs.
SHELL := /bin/bash
LAB ?= deploy/containerlab/mesh.clab.yml
BIN := target/debug
# Integration tests that need no namespaces of their own.
PLAIN_TESTS := $(filter-out netns_% lab_% interop_% etcd_% apiserver_% cluster_%,$(notdir $(basename $(wildcard */tests/*.rs))))
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo -E)

.PHONY: soak-ipam image deb fuzz fuzz-coverage bench-bgp bench-calictl bench-cni bench-typha bench-policy help setup build lab lab-down test lint test-unit test-netns test-lab test-interop test-apiserver test-cluster test-full test-vm test-vm-short

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

setup: ## install the system packages that the other targets need
	@scripts/setup

build: setup ## build every program
	cargo build --workspace --bins

image: ## the image for Kubernetes: an archive for docker, podman, containerd and k3s, of an optimised build (ARCH=amd64|arm64, VARIANT=iptables)
	@scripts/image

deb: ## a Debian package for hosts without Kubernetes
	@scripts/deb

lab: build ## bring up three nodes on this machine and show what runs there
	$(SUDO) $(BIN)/calictl lab up $(LAB) --show

lab-down: ## take the lab away again
	$(SUDO) $(BIN)/calictl lab down $(LAB)

test: setup lint test-unit test-netns test-lab test-interop test-apiserver test-vm-short ## every test of the repository but those of test-vm and test-cluster

lint: setup ## formatting and clippy
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

test-unit: build ## pure cores: unit and property tests, and programs without the kernel
	cargo test --workspace --no-fail-fast --lib --bins $(addprefix --test ,$(PLAIN_TESTS))

test-netns: build ## kernel tests in network namespaces (root)
	scripts/test-as-root 'netns_*'

test-lab: build ## the three-node lab, end to end (root)
	scripts/helm
	scripts/containerlab
	scripts/test-as-root 'lab_*'

test-interop: build ## bgpd with BIRD, FRR, GoBGP, OpenBGPD and ExaBGP, the plugin under podman and containerd, unpacked from Debian's packages (root)
	scripts/test-as-root 'interop_*'

test-apiserver: build ## datastores, manifests and the image beside a real etcd (unpacked) and a real kube-apiserver (built once, some 10 minutes)
	scripts/peers etcd runc
	scripts/kubernetes
	scripts/helm
	scripts/test-as-root 'etcd_*'
	scripts/test-as-root 'apiserver_*'

test-vm-short: build ## what a host may lack and how that is said, headers of IPIP and WireGuard, flows past the rules, in a virtual machine: five minutes
	@scripts/setup vm
	scripts/vm/test encapsulation-devices encapsulation-headers flow-offload late-modules without-nf_tables

test-vm: ## encapsulations, WireGuard, kube-proxy's IPVS (Kubernetes is built once) and kernel tests in a virtual machine (KVM=1: with hardware support; CALI_VM_KERNELS="6.1 6.12")
	@scripts/setup vm
	scripts/vm/test

test-cluster: build ## Cali on a real cluster of two nodes, as k3s lays it out: installed as documented, pods, Services, policies, an update under traffic (root)
	@scripts/setup cluster
	scripts/peers etcd containerd iptables
	scripts/kubernetes
	REPEAT=0 LIMIT=1800 scripts/test-as-root 'cluster_*'

test-full: test test-vm test-cluster ## every test of the repository

fuzz: setup ## bgpd and Typha, either side of it, with damaged streams of real peers (FACTOR=n: that many times what `test` does)
	FUZZ_FACTOR=$(or $(FACTOR),50) cargo test --workspace --test fuzz_seeds

fuzz-coverage: setup ## the same led by coverage (libFuzzer), SECONDS_EACH=60; some 10 minutes to build once
	scripts/fuzz $(or $(SECONDS_EACH),60)

soak-ipam: build ## 20 simulated nodes take 50,000 addresses on SQLite and on etcd, killed at random all the while
	scripts/peers etcd
	SOAK=1 cargo test --workspace --test ipam_soak --test etcd_ipam_soak -- --nocapture

bench-policy: setup ## what policy costs: a change, a start, packets (root; SCENARIO=large|small|set|packets, ROUNDS=n)
	cargo build --release -p cali-bench --bin policy
	$(SUDO) target/release/policy $(SCENARIO) $(if $(ROUNDS),--rounds $(ROUNDS))

bench-typha: setup ## fan-out to 1,000 clients: snapshot, changes, slow clients, reconnects; what one node is sent
	cargo build --release -p cali-bench --bin typha-fanout
	target/release/typha-fanout
	target/release/typha-fanout scoped
	target/release/typha-fanout interest

bench-calictl: setup ## the command line: 100,000 endpoints listed on each datastore, a change watched, its start
	scripts/peers etcd
	scripts/kubernetes
	cargo build --release -p calictl -p cali-bench --bin calictl --bin calictl-speed
	target/release/calictl-speed

bench-cni: setup ## pods that come and go: the plugin and a whole node, one after another and 250 at once (root; PLUGIN=file)
	cargo build --release -p cali-cni -p cali-bench --bin calico --bin cni
	$(SUDO) target/release/cni $(if $(PLUGIN),--plugin $(PLUGIN))

bench-bgp: setup ## BGP daemons side by side under load, 12 minutes (root; ROUNDS=n, LOADS=fan-in,..., DAEMONS=cali,...)
	scripts/peers
	cargo build --release -p bgpd -p cali-bench --bin bgpd --bin bgp-daemons
	$(SUDO) target/release/bgp-daemons $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(LOADS),--shapes $(LOADS)) $(if $(DAEMONS),--daemons $(DAEMONS))
