# The README's commands. Each target builds the virtual environment that it needs. VENV and PYTHON can be set.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
export PYTHONUNBUFFERED := 1

.PHONY: help demo demo-svt demo-detection demo-detection-svt demo-transfer weights test test-fast reliability lint clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-19s %s\n", $$1, $$2}'

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/installed-tests: tests/requirements.txt $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check "setuptools<81" wheel
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-build-isolation \
		-r requirements.txt -r tests/requirements.txt
	@touch $@

# Train, evaluate, predict. $(1): the script, $(2): the config, $(3): the run directory. With `--resume auto`, a second
# `make` resumes a run that was stopped.
define demo
	$(RUN) $(1) --config $(2) --output-dir $(3) --resume auto
	$(RUN) infer.py --model-path $(3)/checkpoint_best.pth --data-set DIGITS
	$(RUN) -m tools.save_images --data-set DIGITS --count 5 --output $(3)/images
	$(RUN) infer.py --model-path $(3)/checkpoint_best.pth --image $(3)/images
	@echo; echo "Curves: $(3)/loss_plot.png and $(3)/acc_plot.png; one line per epoch: $(3)/log.txt"
endef

demo: $(VENV)/installed  ## train SpectFormer on handwritten digits, evaluate, predict (CPU, 3 minutes)
	$(call demo,main_spectformer.py,configs/digits_spectformer.yaml,runs/digits_spectformer)

demo-svt: $(VENV)/installed  ## the same demo with SVT
	$(call demo,main_svt.py,configs/digits_svt.yaml,runs/digits_svt)

# Train a detector on cell nuclei, evaluate it, draw its predictions. $(1): the config, $(2): the run directory.
CELLS = $(wordlist 1,4,$(sort $(wildcard detection/nuclei/val/*.png)))
define demo_detection
	$(RUN) main_detection.py --config $(1) --output-dir $(2) --resume auto
	$(RUN) infer.py --model-path $(2)/checkpoint_best.pth --data-set NUCLEI --report $(2)/report
	$(RUN) infer.py --model-path $(2)/checkpoint_best.pth --image $(CELLS) --drawings $(2)/drawings
	@echo; echo "Cells: $(2)/drawings; the worst images: $(2)/report; curves: $(2)/ap_plot.png"
endef

demo-detection: $(VENV)/installed  ## train a detector on cell nuclei, evaluate, draw predictions (CPU, minutes)
	$(call demo_detection,configs/detection/nuclei_spectformer.yaml,runs/nuclei_spectformer)

demo-detection-svt: $(VENV)/installed  ## the same detection demo with SVT
	$(call demo_detection,configs/detection/nuclei_svt.yaml,runs/nuclei_svt)

WEIGHTS = models/weights/spectformer_h_n.cifar10.safetensors
demo-transfer: $(VENV)/installed  ## digits from a tenth of the images: from CIFAR-10 weights and from random weights
	$(RUN) main_transfer.py --config configs/digits_transfer.yaml --output-dir runs/transfer/from_pretrained \
		--finetune $(WEIGHTS) --resume auto
	$(RUN) main_transfer.py --config configs/digits_transfer.yaml --output-dir runs/transfer/from_scratch \
		--resume auto
	@echo; for run in from_pretrained from_scratch; do \
		echo "$$run: $$(tail -n 1 runs/transfer/$$run/log.txt)"; done

# Set DATA_SET=FOLDER for class folders. Takes hours on a CPU. A second `make` resumes a run that was stopped.
DATA_SET ?= CIFAR10
DATA_FLAGS = --data-set $(DATA_SET) --data-path "$(DATA)"
define train_weights
	$(RUN) $(1) --config configs/cifar10/$(2).yaml $(DATA_FLAGS) --output-dir runs/$(2) --resume auto
	$(RUN) $(1) --config configs/cifar10/$(2)_again.yaml $(DATA_FLAGS) --output-dir runs/$(2)_again --resume auto \
		--finetune runs/$(2)/checkpoint_last.pth
	$(RUN) -m tools.export runs/$(2)_again/checkpoint_last.pth --half --overwrite --to safetensors runs/$(2).cifar10.safetensors
	$(RUN) infer.py --model-path runs/$(2).cifar10.safetensors $(DATA_FLAGS) --amp none
endef
weights: $(VENV)/installed  ## retrain the models of models/weights on CIFAR-10 (in DATA), export in float16, evaluate
	$(call train_weights,main_spectformer.py,spectformer_h_n)
	$(call train_weights,main_svt.py,svt_h_n)

test: $(VENV)/installed-tests  ## run the whole test suite
	$(RUN) -m pytest -q -n 2 --dist worksteal

test-fast: $(VENV)/installed-tests  ## run the tests that take less than 0.25 s and start no process (about a minute)
	$(RUN) -m pytest -q -n 2 -m "not slow"

reliability: $(VENV)/installed-tests  ## run the tests of docs/reliability.md at full counts
	RELIABILITY=full $(RUN) -m pytest -q -n 2 --dist worksteal --timeout 0 tests/reliability

lint: $(VENV)/installed-tests  ## check format and lint rules
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

clean:  ## remove the environment and caches, but not runs/
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
