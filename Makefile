# make reproduce [DATA=folder]   everything from images to predictions, in runs/; resumes
#   BASELINE=1                   also from random weights
#   PRETRAINING, FINETUNING      more options for pretrain.py and finetune.py, such as "--seed 1"
# make study [DATA=folder]       the experiments behind the tables in docs/results/; takes hours
#   SEEDS="0 1 2"                with -j its parts run side by side
# make real REAL=file.npz        a classifier for 8-bit pictures, and its answers on real images
# make bench                     the table of speeds, in runs/bench
# make test                      the tests
# make test-heavy                the same with more kills, more fuzzed files, more images
# make clean                     remove runs/

PYTHON ?= python3
RUNS ?= runs
PER_CLASS ?= 30000
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/ready
PEERS := .venv-bench

# Without DATA the images are simulated; a folder given with DATA is packed once into runs/cache.
ifdef DATA
INPUT := --data $(DATA) --cache-dir $(RUNS)/cache
FEWER_INPUT := $(INPUT)
SAMPLES := $(if $(wildcard $(DATA)/dataset.json),$(DATA)/images.npy,\
  $$(for c in "$(DATA)"/*/; do find "$$c" -name '*.npy' | sort | head -n 5; done))
else
INPUT := --data $(RUNS)/data
SAMPLES := $(RUNS)/samples
SIMULATED_SAMPLES := $(RUNS)/samples/.ready
SIMULATED := $(RUNS)/data/dataset.json
FEWER := $(RUNS)/data-fewer/dataset.json
FEWER_INPUT := --data $(RUNS)/data-fewer
endif

PRETRAINED := $(RUNS)/pretrain/vit-mae-wt.pth
HEAD := $(RUNS)/head/vit-mae-classifier-wt.pth
LAYERNORM := $(RUNS)/layernorm/vit-mae-classifier-wt.pth
FULL := $(RUNS)/full/vit-mae-classifier-wt.pth
STRATEGIES := $(HEAD) $(LAYERNORM) $(FULL)
SCRATCH := $(RUNS)/scratch/vit-mae-classifier-wt.pth
MODEL := $(RUNS)/classifier.onnx
MAPS := $(RUNS)/reconstruction.onnx

.PHONY: reproduce study real bench test test-heavy clean FORCE
.DELETE_ON_ERROR:

reproduce: $(RUNS)/evaluation/metrics.json $(RUNS)/residuals/metrics.json $(RUNS)/predictions.csv
	@cat $(RUNS)/evaluation/comparison.md

# UNSEEN=folder also tests on images of another simulator. The parts are independent, so -j runs them
# side by side. Comparisons at equal compute use fewer images, and the choices one seed.
SEEDS ?= 0 1 2
STUDY_PARTS := $(SEEDS:%=all-%) $(SEEDS:%=fewer-%)

study: $(STUDY_PARTS:%=study-%)
	$(PY) experiments/results.py --out docs/results $(STUDY_PARTS:%=$(RUNS)/study/results-%)

study-all-%: $(RUNS)/dataset.json
	$(PY) experiments/study.py $(INPUT) --out $(RUNS)/study/all-$* --results $(RUNS)/study/results-all-$* \
	  --seeds $* $(if $(UNSEEN),--unseen $(UNSEEN)) \
	  --only strategies scratch without_labels mistakes labels

study-fewer-%: $(RUNS)/dataset.json $(FEWER)
	$(PY) experiments/study.py $(FEWER_INPUT) --out $(RUNS)/study/fewer-$* --results $(RUNS)/study/results-fewer-$* \
	  --seeds $* --only instruments mask_ratio \
	  $(if $(filter $*,$(firstword $(SEEDS))),pretraining_images choices real_images)

# From simulated images, as pictures show them, to predictions for real ones.
PICTURES := $(RUNS)/pictures
ifeq ($(filter real,$(MAKECMDGOALS)),real)
$(if $(wildcard $(REAL)),,$(error name a file of real images: make real REAL=file.npz))
endif
real: $(PICTURES)-full/vit-mae-classifier-wt.pth
	$(PY) experiments/real_images.py classify --images "$(REAL)" --weights $< --out $(RUNS)/real.csv

$(PICTURES)/dataset.json: | $(RUNS)/data/dataset.json
	$(PY) experiments/real_images.py pictures --any --data $(RUNS)/data --out $(PICTURES)

$(PICTURES)-pretrain/vit-mae-wt.pth: $(PICTURES)/dataset.json
	$(PY) pretrain.py --data $(PICTURES) --out $(@D) --resume

$(PICTURES)-full/vit-mae-classifier-wt.pth: $(PICTURES)-pretrain/vit-mae-wt.pth
	$(PY) finetune.py --data $(PICTURES) --pretrained $< --strategy full --epochs 12 \
	  --out $(@D) --resume

# In an environment of its own, with the peers.
bench: $(PEERS)/ready
	$(PEERS)/bin/python experiments/bench.py --out $(RUNS)/bench

test: $(READY)
	$(PY) -m pytest -q tests

test-heavy: export KILLS := 20
test-heavy: export FUZZED_FILES := 200000
test-heavy: export PREDICT_IMAGES := 200000
test-heavy: test

clean:
	rm -rf $(RUNS)

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(PEERS)/ready: requirements.txt experiments/requirements-bench.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	-$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r experiments/requirements-bench.txt
	touch $@

$(RUNS)/data/dataset.json: | $(READY)
	$(PY) simulate.py --model Model_II --per-class $(PER_CLASS) --seed 0 --out $(RUNS)/data

$(RUNS)/data-fewer/dataset.json: | $(READY)
	$(PY) simulate.py --model Model_II --per-class 10000 --seed 10 --out $(RUNS)/data-fewer

# Rewritten only when the data changed, so a changed folder is trained on again.
$(RUNS)/dataset.json: $(SIMULATED) FORCE | $(READY)
	$(PY) data.py $(INPUT) --out $@

$(PRETRAINED): $(RUNS)/dataset.json | $(READY)
	$(PY) pretrain.py $(INPUT) --out $(@D) --resume $(PRETRAINING)

$(HEAD) $(FULL): $(RUNS)/%/vit-mae-classifier-wt.pth: $(PRETRAINED)
	$(PY) finetune.py $(INPUT) --pretrained $(PRETRAINED) --strategy $* --out $(@D) --resume $(FINETUNING)

# The LayerNorms continue from the trained head.
$(LAYERNORM): $(HEAD)
	$(PY) finetune.py $(INPUT) --pretrained $(HEAD) --strategy layernorm --out $(@D) --resume $(FINETUNING)

$(SCRATCH): $(RUNS)/dataset.json | $(READY)
	$(PY) finetune.py $(INPUT) --pretrained none --strategy full --out $(@D) --resume $(FINETUNING)

$(RUNS)/evaluation/metrics.json: $(STRATEGIES) $(if $(BASELINE),$(SCRATCH))
	$(PY) evaluate.py $(INPUT) --weights $^ --out $(@D)

$(RUNS)/residuals/metrics.json: $(PRETRAINED)
	$(PY) reconstruct.py $(INPUT) --weights $(PRETRAINED) --out $(@D)

# The strategy that is best on validation.
$(MODEL): $(STRATEGIES)
	$(PY) export.py $(INPUT) --weights $^ --out $@

# A few images to predict on: freshly simulated, or the first of every class folder.
$(RUNS)/samples/.ready: | $(READY)
	$(PY) simulate.py --model Model_II --per-class 5 --seed 1 --layout folder --out $(RUNS)/samples
	touch $@

$(MAPS): $(PRETRAINED)
	$(PY) export.py $(INPUT) --what reconstruction --weights $(PRETRAINED) --out $@

$(RUNS)/predictions.csv: $(MODEL) $(MAPS) $(SIMULATED_SAMPLES)
	$(PY) predict.py --model $(MODEL) --maps $(MAPS) --sheet $(@D)/sheet.png --out $@ $(SAMPLES)
