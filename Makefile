# `make run` compiles the built-in model and lets it write a story; `make test` runs every test. Both install what is missing.

export LLVM_SYS_221_PREFIX ?= /usr/lib/llvm-22

.PHONY: run test setup

run: setup
	cargo run --release --quiet -- run builtin -p "Once upon a time" --seed 7

test: setup
	@tools/ptxas
	cargo test --workspace --quiet

setup:
	@tools/setup
