# Everything a newcomer needs: `make demo`, `make test`, `make serve`. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv/bin
GPU_PYTHON = $(firstword $(wildcard $(VENV)/python) $(PYTHON))
PORT ?= 8188

.DEFAULT_GOAL := help
.PHONY: help env demo serve test lint format host-path test-gpu bench bench-gpu bench-inversion bench-pairs bench-quality bench-soak bench-speed pairs train-demo thumbnails node-pictures icon clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

env:  ## build .venv and find or fetch ComfyUI (a no-op when nothing changed)
	@$(PYTHON) tools/env.py

demo: env  ## render every shared workflow in a real ComfyUI; open output/demo/index.html after
	@$(VENV)/python -m tools.demo

serve: env  ## start ComfyUI with this pack and print its address (PORT=8188)
	@$(VENV)/python -m tools.server --port $(PORT)

test: env  ## run all tests (ARGS="tests/unit -k swap" for some)
	@$(VENV)/pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-gpu:  ## the laws in half precision on a GPU (fetches nothing; P2P_DEVICE=cpu: without one)
	@$(GPU_PYTHON) -m pytest tests/gpu $(ARGS)

lint: env  ## ruff, mypy, and who may import whom
	@mkdir -p .cache/typecheck && ln -sfn "$(CURDIR)" .cache/typecheck/p2p  # a name that Python can import
	@failed=0; $(VENV)/ruff check . || failed=1; cd .cache/typecheck && \
	"$(CURDIR)/$(VENV)/mypy" --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache" -p p2p \
	|| failed=1; "$(CURDIR)/$(VENV)/lint-imports" "$(CURDIR)/pyproject.toml" --no-cache || failed=1; exit $$failed

format: env  ## let ruff sort imports and fix what it can
	@$(VENV)/ruff check --fix .

host-path:  ## print the ComfyUI folder in use
	@$(PYTHON) tools/env.py --host-path

bench: env  ## what an edit costs on the bundled model, in a minute
	@$(VENV)/python benchmarks/speed.py $(ARGS)

bench-speed: env  ## cost at the widths of SD1.5, SDXL and transformers, for docs/benchmarks.md (two hours on a CPU)
	@$(VENV)/python benchmarks/speed.py --page $(ARGS)

bench-gpu:  ## what an edit costs on a GPU, for docs/benchmarks.md (fetches nothing)
	@$(GPU_PYTHON) benchmarks/gpu.py --page $(ARGS)

bench-quality: env  ## edit success against what stays, for docs/benchmarks.md (an hour; resumes)
	@$(VENV)/python benchmarks/quality.py $(ARGS)

bench-soak: env  ## hundreds of prompts on a real server, for docs/benchmarks.md (ARGS="--prompts 30": fewer)
	@$(VENV)/python benchmarks/soak.py $(ARGS)

bench-inversion: env  ## edit pictures by every method and inversion; figures into docs/inversion.* (minutes)
	@$(VENV)/python benchmarks/inversion.py $(ARGS)

pairs: env  ## a small training set of edited pairs on the bundled model, and output/pairs/example/report.html
	@$(VENV)/python pairs make pairs/example.jsonl --out output/pairs/example --demo --keep 2 $(ARGS)
	@$(VENV)/python pairs report output/pairs/example

bench-pairs: env  ## what the engine of pairs costs, how it scales, kills at random moments (an hour)
	@for part in engine speed acceptance kills cost; do $(VENV)/python benchmarks/pairs.py $$part || exit 1; done

train-demo: env  ## train the bundled model and its CLIP from nothing (hours; resumes where it stopped)
	@COMFYUI_PATH="$$($(PYTHON) tools/env.py --host-path)" $(VENV)/python -m demo.train $(ARGS)
	@$(VENV)/python -m demo.train_clip

node-pictures: env  ## redraw the pictures on the nodes' help pages
	@$(VENV)/python -m tools.node_pictures

icon: env  ## redraw docs/icon.png and docs/banner.png
	@$(VENV)/python -m tools.icon

thumbnails: env  ## render every workflow and replace workflows/*.jpg (ARGS=word_swap: one of them)
	@$(VENV)/python -m tools.demo --thumbnails $(ARGS)

clean:  ## remove outputs and caches (not .venv and .host)
	rm -rf output .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -not -path './.host/*' -prune -exec rm -rf {} +
