# make reproduce [DATA=folder]   everything from images to predictions, in runs/; resumes, and
#                                repeats what depends on an option or on data that changed;
#                                with -j2 the fine-tunings run side by side
#   BASELINE=1                   also from random weights
#   PER_CLASS                    simulated images of a class, without DATA
#   CLUSTERS                     kinds to sort images into without labels; 3 without DATA, none with it
#   PRETRAINING, FINETUNING      more options for pretrain.py and finetune.py, such as "--seed 1"
# make study [DATA=folder]       the experiments of docs/results/, in runs/study/results; hours
#   SEEDS="0 1 2"                with -j its parts run side by side
# make real REAL=file.npz        two classifiers for 8-bit pictures, and their answers on real images
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

# Text as one word of a shell command, whatever it holds.
quoted = '$(subst ','\'',$(1))'

# Without DATA the images are simulated; a folder given with DATA is packed once into runs/cache.
ifneq ($(origin DATA),undefined)
$(if $(strip $(value DATA)),,$(error DATA is empty: name a folder, or leave it out to simulate))
FOLDER := $(call quoted,$(value DATA))
INPUT = --data $(FOLDER) --cache-dir $(RUNS)/cache
FEWER_INPUT = $(INPUT)
CLUSTERS ?=
else
FOLDER := $(RUNS)/samples
INPUT := --data $(RUNS)/data
SIMULATED_SAMPLES := $(RUNS)/samples/.ready
SIMULATED := $(RUNS)/data/dataset.json
FEWER := $(RUNS)/data-fewer/dataset.json
FEWER_INPUT := --data $(RUNS)/data-fewer
CLUSTERS ?= 3
endif

PRETRAINED := $(RUNS)/pretrain/vit-mae-wt.pth
HEAD := $(RUNS)/head/vit-mae-classifier-wt.pth
LAYERNORM := $(RUNS)/layernorm/vit-mae-classifier-wt.pth
FULL := $(RUNS)/full/vit-mae-classifier-wt.pth
RESIDUAL := $(RUNS)/residual/vit-mae-classifier-wt.pth
STRATEGIES := $(HEAD) $(LAYERNORM) $(FULL) $(RESIDUAL)
SCRATCH := $(RUNS)/scratch/vit-mae-classifier-wt.pth
MODEL := $(RUNS)/classifier.onnx
MAPS := $(RUNS)/reconstruction.onnx
$(foreach name,RUNS MODEL,$(if $(filter 1,$(words $($(name)))),,\
  $(error $(name) must be one path without spaces, got "$($(name))")))

# One file per stage holds its options and is rewritten when they change. make then repeats every
# stage that is older.
OPTIONS := $(RUNS)/options
pretraining_options = $(PRETRAINING)
finetuning_options = $(FINETUNING)
evaluation_options = $(if $(BASELINE),with the baseline)
residuals_options = $(if $(CLUSTERS),--clusters $(call quoted,$(CLUSTERS)))
predictions_options = $(MODEL) and $(MAPS) of $(FOLDER)

# With -jN the stages that run side by side share the cores: threads that wait for each other crawl.
# -j without a number counts as -j4: so many long stages wait for the pre-training.
JOBS = $(filter -j%,$(MAKEFLAGS))
THREADS = $(shell jobs=$(JOBS:-j%=%); threads=$$(($$(getconf _NPROCESSORS_ONLN) / $${jobs:-4})); \
  echo $$((threads > 1 ? threads : 1)))
SHARE = $(if $(JOBS),$(if $(OMP_NUM_THREADS),,OMP_NUM_THREADS=$(THREADS)))

.PHONY: reproduce study real bench test test-heavy clean FORCE
.DELETE_ON_ERROR:

reproduce: $(RUNS)/evaluation/metrics.json $(RUNS)/residuals/.done $(RUNS)/predictions.csv
	@cat $(RUNS)/evaluation/comparison.md

# UNSEEN=folder also tests on images of another simulator, CUTOUTS=folder on real cutouts. The parts
# are independent, so -j runs them side by side. Comparisons at equal compute use fewer images, and
# the choices one seed.
SEEDS ?= 0 1 2
STUDY_PARTS := $(SEEDS:%=all-%) $(SEEDS:%=fewer-%) instruments

study: $(STUDY_PARTS:%=study-%)
	$(PY) experiments/results.py --out $(RUNS)/study/results $(STUDY_PARTS:%=$(RUNS)/study/results-%)

study-all-%: $(RUNS)/dataset.json
	$(PY) experiments/study.py $(INPUT) --out $(RUNS)/study/all-$* --results $(RUNS)/study/results-all-$* \
	  --seeds $* $(if $(UNSEEN),--unseen $(call quoted,$(value UNSEEN))) \
	  $(if $(CUTOUTS),--cutouts $(call quoted,$(value CUTOUTS))) \
	  --only strategies scratch without_labels mistakes labels labels_all_classes unfamiliar

study-fewer-%: $(RUNS)/dataset.json $(FEWER)
	$(PY) experiments/study.py $(FEWER_INPUT) --out $(RUNS)/study/fewer-$* --results $(RUNS)/study/results-fewer-$* \
	  --seeds $* --only mask_ratio \
	  $(if $(filter $*,$(firstword $(SEEDS))),pretraining_images choices real_images)

study-instruments: $(RUNS)/dataset.json
	$(PY) experiments/study.py $(INPUT) --out $(RUNS)/study/instruments --results $(RUNS)/study/results-instruments \
	  --seeds $(SEEDS) --only instruments

# From simulated images, as pictures show them, to predictions for real ones.
PICTURES := $(RUNS)/pictures
ifeq ($(filter real,$(MAKECMDGOALS)),real)
$(if $(shell test -e $(call quoted,$(value REAL)) && echo found),,$(error name a file of real images: make real REAL=file.npz))
endif
classify_real = $(PY) experiments/real_images.py classify --images $(call quoted,$(value REAL)) \
  --weights $(PICTURES)-$(1)/vit-mae-classifier-wt.pth --out $(RUNS)/real-$(1).csv
real: $(PICTURES)-full/vit-mae-classifier-wt.pth $(PICTURES)-residual/vit-mae-classifier-wt.pth
	$(call classify_real,full)
	$(call classify_real,residual)

$(PICTURES)/dataset.json: $(RUNS)/data/dataset.json
	rm -rf $(@D)
	$(PY) experiments/real_images.py pictures --any --data $(RUNS)/data --out $(PICTURES)

$(PICTURES)-pretrain/vit-mae-wt.pth: $(PICTURES)/dataset.json
	@$(mode) set -x; \
	$(PY) pretrain.py --data $(PICTURES) --out $(@D) $$mode

$(PICTURES)-full/vit-mae-classifier-wt.pth $(PICTURES)-residual/vit-mae-classifier-wt.pth: \
  $(PICTURES)-%/vit-mae-classifier-wt.pth: $(PICTURES)-pretrain/vit-mae-wt.pth
	@$(mode) set -x; \
	$(PY) finetune.py --data $(PICTURES) --pretrained $< --strategy $* $(if $(filter full,$*),--epochs 12) \
	  --out $(@D) $$mode

# In an environment of its own, with the peers.
bench: $(PEERS)/ready
	$(PEERS)/bin/python experiments/bench.py --out $(RUNS)/bench

# A process per core; each test file stays in one, since its tests share what they trained.
test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadfile tests

test-heavy: export HEAVY := 1
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

$(OPTIONS)/%: FORCE
	@mkdir -p $(@D)
	@options=$(call quoted,$($*_options)); \
	printf '%s\n' "$$options" | cmp -s - $@ || printf '%s\n' "$$options" > $@

# A simulated data set of (images a class, seed). It replaces one of another number of images, and
# nothing else.
define simulate
@origin='"origin": "simulate.py Model_II, $(1) a class, seed $(2), noise-free"'; \
if [ -e $@ ] && grep -qF "$$origin" $@; then exit 0; fi; \
if [ -e $@ ] && ! grep -qE '"origin": "simulate.py Model_II, [0-9]+ a class, seed $(2),' $@; then \
  echo 'error: $(@D) was not simulated by make: name it with DATA, or remove it' >&2; exit 1; fi; \
rm -rf $(@D).new; \
$(PY) simulate.py --model Model_II --per-class $(call quoted,$(1)) --seed $(2) --out $(@D).new && \
rm -rf $(@D) && mv $(@D).new $(@D)
endef

$(RUNS)/data/dataset.json: FORCE | $(READY)
	$(call simulate,$(PER_CLASS),0)

$(RUNS)/data-fewer/dataset.json: FORCE | $(READY)
	$(call simulate,10000,10)

# Start of a training's recipe: a run that started before one of its inputs changed is replaced, any
# other is resumed. The script knows whether the run is still alive.
define mode
mode=--resume; for file in $^; do if [ -e $(@D)/config.json ] && [ $$file -nt $(@D)/config.json ]; then \
  echo "$(@D) is older than $$file: it is trained again"; mode=--overwrite; fi; done;
endef

# Rewritten only when the data changed, so a changed folder is trained on again.
$(RUNS)/dataset.json: $(SIMULATED) FORCE | $(READY)
	$(PY) prepare.py $(INPUT) --out $@

$(PRETRAINED): $(RUNS)/dataset.json $(OPTIONS)/pretraining | $(READY)
	@$(mode) set -x; \
	$(PY) pretrain.py $(INPUT) --out $(@D) $$mode $(PRETRAINING)

$(HEAD) $(FULL) $(RESIDUAL): $(RUNS)/%/vit-mae-classifier-wt.pth: $(PRETRAINED) $(OPTIONS)/finetuning
	@$(mode) set -x; \
	$(SHARE) $(PY) finetune.py $(INPUT) --pretrained $(PRETRAINED) --strategy $* --out $(@D) $$mode $(FINETUNING)

# The LayerNorms continue from the trained head.
$(LAYERNORM): $(HEAD) $(OPTIONS)/finetuning
	@$(mode) set -x; \
	$(SHARE) $(PY) finetune.py $(INPUT) --pretrained $(HEAD) --strategy layernorm --out $(@D) $$mode $(FINETUNING)

$(SCRATCH): $(RUNS)/dataset.json $(OPTIONS)/finetuning | $(READY)
	@$(mode) set -x; \
	$(SHARE) $(PY) finetune.py $(INPUT) --pretrained none --strategy full --out $(@D) $$mode $(FINETUNING)

$(RUNS)/evaluation/metrics.json: $(STRATEGIES) $(if $(BASELINE),$(SCRATCH)) $(OPTIONS)/evaluation
	$(SHARE) $(PY) evaluate.py $(INPUT) --weights $(filter %.pth,$^) --out $(@D)

# Without images of two kinds there is no metrics.json.
$(RUNS)/residuals/.done: $(PRETRAINED) $(OPTIONS)/residuals
	$(SHARE) $(PY) reconstruct.py $(INPUT) --weights $(PRETRAINED) --out $(@D) $(residuals_options)
	touch $@

# The strategy that is best on validation.
$(MODEL): $(STRATEGIES)
	$(SHARE) $(PY) export.py $(INPUT) --weights $^ --out $@

# A few images to predict on: freshly simulated, or those of a packed data set, or the first of every
# class folder.
$(RUNS)/samples/.ready: | $(READY)
	rm -rf $(RUNS)/samples
	$(PY) simulate.py --model Model_II --per-class 5 --seed 1 --layout folder --out $(RUNS)/samples
	touch $@

$(MAPS): $(PRETRAINED)
	$(SHARE) $(PY) export.py $(INPUT) --what reconstruction --weights $(PRETRAINED) --out $@

$(RUNS)/predictions.csv: $(MODEL) $(MAPS) $(SIMULATED_SAMPLES) $(OPTIONS)/predictions
	@rm -f $@
	folder=$(FOLDER); set --; \
	if [ -f "$$folder/dataset.json" ]; then set -- "$$folder/images.npy"; else \
	  for class in "$$folder"/*/; do n=0; for file in "$$class"*; do case "$$file" in \
	    *.[nN][pP][yYzZ]|*.[fF][iI][tT]*|*.[fF][tT][sS]*|*.[fF][zZ]) \
	      if [ $$n -lt 5 ] && [ -f "$$file" ]; then set -- "$$@" "$$file"; n=$$((n + 1)); fi;; \
	  esac; done; done; fi; \
	$(PY) predict.py --model $(MODEL) --maps $(MAPS) --sheet $(@D)/sheet.png --out $@ -- "$$@" \
	  || [ $$? -eq 1 -a -s $@ ]  # 1: some files could not be read, which predict.py says
