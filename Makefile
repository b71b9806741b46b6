# make demo: from an empty folder to a dream you can watch, about 15 minutes on two CPU cores
# make test: ruff and the tests
PYTHON ?= python3
TORCH ?= torch
BIN := .venv/bin

demo: .venv/installed data/wall/meta.json
	if [ -e out/wall/latest.safetensors ]; then $(BIN)/python train.py config/wall.py --resume=True; \
	else $(BIN)/python train.py config/wall.py; fi
	$(BIN)/python evaluate.py --ckpt=out/wall
	$(BIN)/python sample.py --ckpt=out/wall
	@echo "watch the dream: out/wall/rollout.gif"

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q

data/wall/meta.json: | .venv/installed
	$(BIN)/python data.py wall

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e '.[test]'
	touch $@

.PHONY: demo test
