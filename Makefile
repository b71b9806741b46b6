# make demo: from an empty folder to a dream you can watch, within 15 minutes on two CPU cores
# make test: ruff and the tests
PYTHON ?= python3
TORCH ?= torch
BIN := .venv/bin
RESULTS := $(or $(RESULTS_DIR),.)

demo: .venv/installed
	[ -e $(RESULTS)/data/wall ] || $(BIN)/python data.py wall
	resume=$$([ -e $(RESULTS)/out/wall/latest.safetensors ] && echo --resume=True); \
		$(BIN)/python train.py config/wall.py $$resume
	$(BIN)/python evaluate.py --ckpt=out/wall
	$(BIN)/python sample.py --ckpt=out/wall
	@echo "watch the dream: $(RESULTS)/out/wall/rollout.gif"

test: .venv/testable
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e '.[plot]'
	touch $@

.venv/testable: .venv/installed
	$(BIN)/pip install --quiet -e '.[test,eval]' "torch==$$($(BIN)/python -c 'import torch; print(torch.__version__.split("+")[0])')"
	touch $@

.PHONY: demo test
