# make demo                      classify the example images with the models of models/, in runs/demo
# make quick                     a small make reproduce in runs/quick/: 18,000 images, head and residual alone
# make reproduce [DATA=folder]   everything from images to predictions, in runs/. Each script knows by
#                                content whether its result is there: what is finished is skipped, what
#                                was stopped resumes, what an option or the data changed is replaced.
#                                With -j2 the fine-tunings run side by side
#   BASELINE=1                   also from random weights
#   PER_CLASS                    simulated images of a class, without DATA
#   CLUSTERS                     kinds to sort images into without labels; 3 without DATA, none with it
#   CLASSIFIERS                  strategies of fine-tuning; head layernorm full residual
#   PRETRAINING, FINETUNING      more options for pretrain.py and finetune.py, such as "--seed 1";
#                                FINETUNING_residual and the like: for one strategy
# make mass [DATA=folder]        what estimates the mass of the axion, its figures and runs/mass.onnx
# make sharpen [DATA=folder]     what sharpens images, its figures and runs/sharpen.onnx; DATA has pairs in HR and LR
#   PAIRS                        simulated pairs, without DATA
# make many-lenses [DATA=folder] what classifies images with another lens in each, its figures and runs/many-lenses.onnx
#   LENSES                       simulated training images of a class, without DATA
#   MANY_PRETRAINING, MANY_FINETUNING   options in place of those below
# make study [DATA=folder]       the experiments of docs/results/, in runs/study/results; hours
#   SEEDS="0 1 2"                with -j its parts run side by side
#   UNSEEN, CUTOUTS              folders: images of another simulator to test on; real cutouts
# make real REAL=file.npz        two classifiers for 8-bit pictures, and their answers on real images
# make models                    put what make reproduce left in runs/ into models/, with checksums
# make page                      a web page that classifies in the browser, with its models, in page/
# make bench                     the table of speeds, in runs/bench
# make test                      the tests
# make test-heavy                the same with more kills, more fuzzed files, more images
# make clean                     remove what make has put into runs/
#
# RUNS=folder names another folder than runs/. All these are read from make's command line: a variable
# of the environment that has such a name belongs to something else.

PYTHON := python3
RUNS := runs
PER_CLASS := 30000
PAIRS := 8000
LENSES := 10000
# Many visible patches, since a few do not say which lens it is. sqrt makes photon noise equally strong everywhere.
MANY_PRETRAINING := --classes no --patch-size 15 --mask-ratio 0.5 --transform sqrt --epochs 80 \
  --decoder-embed-dim 128 --decoder-depth 2
MANY_FINETUNING := --epochs 16
SEEDS := 0 1 2
BASELINE :=
CLASSIFIERS := head layernorm full residual
PRETRAINING :=
FINETUNING :=
$(foreach name,head layernorm full residual,$(eval FINETUNING_$(name) :=))
UNSEEN :=
CUTOUTS :=
REAL :=
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/ready
PEERS := .venv-bench
SMALL := .venv-predict

# Text as one word of a shell command, whatever it holds.
quoted = '$(subst ','\'',$(1))'

# Without DATA the images are simulated; a folder given with DATA is packed once into runs/cache.
ifeq ($(origin DATA),command line)
$(if $(strip $(value DATA)),,$(error DATA is empty: name a folder, or leave it out to simulate))
FOLDER := $(call quoted,$(value DATA))
INPUT = --data $(FOLDER) --cache-dir $(RUNS)/cache
IMAGES := packed
SAMPLES :=
CLUSTERS :=
else
FOLDER := $(RUNS)/samples
INPUT := --data $(RUNS)/data
IMAGES := $(RUNS)/data/dataset.json
SAMPLES := $(RUNS)/samples
CLUSTERS := 3
endif

PRETRAINED := $(RUNS)/pretrain/vit-mae-wt.pth
HEAD := $(RUNS)/head/vit-mae-classifier-wt.pth
LAYERNORM := $(RUNS)/layernorm/vit-mae-classifier-wt.pth
FULL := $(RUNS)/full/vit-mae-classifier-wt.pth
RESIDUAL := $(RUNS)/residual/vit-mae-classifier-wt.pth
STRATEGIES := $(CLASSIFIERS:%=$(RUNS)/%/vit-mae-classifier-wt.pth)
LONGEST := $(filter $(FULL) $(RESIDUAL),$(STRATEGIES))
MANY := $(RUNS)/many-lenses
ifeq ($(origin DATA),command line)
PAIR_INPUT = $(INPUT)
PAIR_IMAGES := packed
MANY_INPUT = $(INPUT)
MANY_IMAGES := packed
else
PAIR_INPUT := --data $(RUNS)/pairs
PAIR_IMAGES := $(RUNS)/pairs/dataset.json
MANY_INPUT := --data $(MANY)/data
MANY_IMAGES := $(MANY)/data/dataset.json
endif
MANY_MAE := $(MANY)/pretrain/vit-mae-wt.pth
MANY_CLASSIFIER := $(MANY)/residual/vit-mae-classifier-wt.pth
SHARP_MAE := $(RUNS)/sharpen-pretrain/vit-mae-wt.pth
SHARPENER := $(RUNS)/sharpen/vit-mae-sharpen-wt.pth
MASS := $(RUNS)/mass/vit-mae-mass-wt.pth
SCRATCH := $(RUNS)/scratch/vit-mae-classifier-wt.pth
EVALUATION := $(RUNS)/evaluation/metrics.json
RESIDUALS := $(RUNS)/residuals/metrics.json
MODEL := $(RUNS)/classifier.onnx
MAPS := $(RUNS)/reconstruction.onnx
PREDICTIONS := $(RUNS)/predictions.csv
PICTURES := $(RUNS)/pictures
REAL_ANSWERS := $(RUNS)/real-full.csv $(RUNS)/real-residual.csv
STUDY_PARTS := $(SEEDS:%=all-%) instruments
$(foreach name,RUNS MODEL,$(if $(filter 1,$(words $($(name)))),,\
  $(error $(name) must be one path without spaces, got "$($(name))")))

# With -jN the stages that run side by side share the cores: threads that wait for each other crawl.
# -j without a number counts as -j4: so many long stages wait for the pre-training.
JOBS = $(filter -j%,$(MAKEFLAGS))
THREADS = $(shell jobs=$(JOBS:-j%=%); threads=$$(($$(getconf _NPROCESSORS_ONLN) / $${jobs:-4})); \
  echo $$((threads > 1 ? threads : 1)))
SHARE = $(if $(JOBS),$(if $(OMP_NUM_THREADS),,OMP_NUM_THREADS=$(THREADS)))

# make only puts the stages into order: each of them is called, and knows what is left to do.
.PHONY: sharpen $(RUNS)/pairs/dataset.json $(SHARP_MAE) $(SHARPENER) $(RUNS)/sharpen.onnx $(RUNS)/sharpen-evaluation/metrics.json \
  many-lenses $(MANY)/data/dataset.json $(MANY_MAE) $(MANY_CLASSIFIER) $(RUNS)/many-lenses.onnx $(MANY)/evaluation/metrics.json \
  demo quick reproduce mass $(MASS) $(RUNS)/mass.onnx $(RUNS)/mass-evaluation/metrics.json packed models page study real bench test test-heavy clean $(RUNS)/.made-by-make \
  $(RUNS)/data/dataset.json $(RUNS)/samples $(PRETRAINED) $(STRATEGIES) $(SCRATCH) $(EVALUATION) $(RESIDUALS) \
  $(MODEL) $(MAPS) $(PREDICTIONS) $(STUDY_PARTS:%=study-%) $(REAL_ANSWERS) $(PICTURES)/dataset.json \
  $(PICTURES)-pretrain/vit-mae-wt.pth $(PICTURES)-full/vit-mae-classifier-wt.pth \
  $(PICTURES)-residual/vit-mae-classifier-wt.pth

demo: $(SMALL)/ready $(RUNS)/.made-by-make
	@mkdir -p $(RUNS)/demo
	@$(SMALL)/bin/python predict.py --sheet $(RUNS)/demo/sheet.png --out $(RUNS)/demo/predictions.csv models/examples
	@cat $(RUNS)/demo/predictions.csv

# Fewer images, strategies and steps, unless the command line says how many. Images of DATA may be too small for
# averaged maps, or too few for one epoch.
unless = $(if $(findstring $(firstword $(2)),$(1)),,$(2))
QUICK_RESIDUAL = $(foreach option,$(if $(SAMPLES),--map-pool=2 --epochs=1,--epochs=2) --batch-size=32,\
  $(call unless,$(FINETUNING) $(FINETUNING_residual),$(subst =, ,$(option))))
quick: PER_CLASS := 6000
quick: CLASSIFIERS := head residual
quick: $(READY) $(RUNS)/.made-by-make
	@$(MAKE) --no-print-directory -j2 reproduce RUNS=$(RUNS)/quick PER_CLASS=$(call quoted,$(PER_CLASS)) \
	  CLASSIFIERS=$(call quoted,$(CLASSIFIERS)) CLUSTERS= PRETRAINING=$(call quoted,$(call unless,$(PRETRAINING),--epochs 8) \
	  $(call unless,$(PRETRAINING),--lr 0.004) $(PRETRAINING)) FINETUNING_residual=$(call quoted,$(QUICK_RESIDUAL) \
	  $(FINETUNING_residual))
	@echo '$(RUNS)/quick: report in evaluation/report.html, reconstructions in pretrain/, maps in residuals/maps.png,'
	@echo 'predictions.csv and sheet.png of images that no network has seen$(if $(SAMPLES),. Of each class $(PER_CLASS) images; make reproduce has 30000)'

reproduce: $(EVALUATION) $(RESIDUALS) $(PREDICTIONS)
	@cat $(RUNS)/evaluation/comparison.md

mass: $(RUNS)/mass-evaluation/metrics.json $(RUNS)/mass.onnx

$(MASS): $(PRETRAINED)
	$(SHARE) $(PY) finetune.py $(INPUT) --task mass --strategy residual --pretrained $(PRETRAINED) --out $(@D) --update \
	  $(FINETUNING)

$(RUNS)/mass-evaluation/metrics.json: $(MASS)
	$(SHARE) $(PY) evaluate.py $(INPUT) --weights $(MASS) --out $(@D) --update

$(RUNS)/mass.onnx: $(MASS)
	$(SHARE) $(PY) export.py $(INPUT) --what mass --weights $(MASS) --out $@ --update

sharpen: $(RUNS)/sharpen-evaluation/metrics.json $(RUNS)/sharpen.onnx

$(RUNS)/pairs/dataset.json: $(READY) $(RUNS)/.made-by-make
	$(PY) simulate.py --model Pairs --per-class $(call quoted,$(PAIRS)) --out $(@D) --update

$(SHARP_MAE): $(PAIR_IMAGES)
	$(PY) pretrain.py $(PAIR_INPUT) --coarse --classes all --patch-size 5 --transform sqrt --out $(@D) --update $(PRETRAINING)

$(SHARPENER): $(SHARP_MAE)
	$(PY) finetune.py $(PAIR_INPUT) --task sharpen --strategy full --pretrained $(SHARP_MAE) --out $(@D) --update \
	  $(FINETUNING)

$(RUNS)/sharpen-evaluation/metrics.json: $(SHARPENER)
	$(SHARE) $(PY) evaluate.py $(PAIR_INPUT) --weights $(SHARPENER) --out $(@D) --update

$(RUNS)/sharpen.onnx: $(SHARPENER)
	$(SHARE) $(PY) export.py $(PAIR_INPUT) --what sharpen --weights $(SHARPENER) --out $@ --update

many-lenses: $(MANY)/evaluation/metrics.json $(RUNS)/many-lenses.onnx
	@cat $(MANY)/evaluation/comparison.md

$(MANY)/data/dataset.json: $(READY) $(RUNS)/.made-by-make
	$(PY) simulate.py --model Many_Lenses --per-class $(call quoted,$(LENSES)) --out $(@D) --update

$(MANY_MAE): $(MANY_IMAGES)
	$(PY) pretrain.py $(MANY_INPUT) --out $(@D) --update $(MANY_PRETRAINING) $(PRETRAINING)

$(MANY_CLASSIFIER): $(MANY_MAE)
	$(PY) finetune.py $(MANY_INPUT) --pretrained $(MANY_MAE) --strategy residual --with-image --augment flips \
	  --out $(@D) --update $(MANY_FINETUNING) $(FINETUNING)

$(MANY)/evaluation/metrics.json: $(MANY_CLASSIFIER)
	$(SHARE) $(PY) evaluate.py $(MANY_INPUT) --weights $(MANY_CLASSIFIER) --out $(@D) --update

$(RUNS)/many-lenses.onnx: $(MANY_CLASSIFIER)
	$(SHARE) $(PY) export.py $(MANY_INPUT) --weights $(MANY_CLASSIFIER) --out $@ --update

$(RUNS)/data/dataset.json: $(READY) $(RUNS)/.made-by-make
	$(PY) simulate.py --model Model_II --per-class $(call quoted,$(PER_CLASS)) --out $(@D) --update

packed: $(READY) $(RUNS)/.made-by-make
	$(PY) data.py $(INPUT)

$(PRETRAINED): $(IMAGES)
	$(PY) pretrain.py $(INPUT) --out $(@D) --update $(PRETRAINING)

$(HEAD) $(FULL) $(RESIDUAL): $(RUNS)/%/vit-mae-classifier-wt.pth: $(PRETRAINED)
	$(SHARE) $(PY) finetune.py $(INPUT) --pretrained $(PRETRAINED) --strategy $* --out $(@D) --update $(FINETUNING) $(FINETUNING_$*)

# The LayerNorms continue from the trained head.
$(LAYERNORM): $(HEAD)
	$(SHARE) $(PY) finetune.py $(INPUT) --pretrained $(HEAD) --strategy layernorm --out $(@D) --update $(FINETUNING) $(FINETUNING_layernorm)

$(SCRATCH): $(IMAGES)
	$(SHARE) $(PY) finetune.py $(INPUT) --pretrained none --strategy full --out $(@D) --update $(FINETUNING)

# The longest trainings come first, for -j.
$(EVALUATION): $(LONGEST) $(STRATEGIES) $(if $(BASELINE),$(SCRATCH))
	$(SHARE) $(PY) evaluate.py $(INPUT) --weights $(STRATEGIES) $(if $(BASELINE),$(SCRATCH)) --out $(@D) --update

$(RESIDUALS): $(PRETRAINED)
	$(SHARE) $(PY) reconstruct.py $(INPUT) --weights $(PRETRAINED) --out $(@D) --update \
	  $(if $(CLUSTERS),--clusters $(call quoted,$(CLUSTERS)))

# The strategy that is best on validation.
$(MODEL): $(STRATEGIES)
	$(SHARE) $(PY) export.py $(INPUT) --weights $^ --out $@ --update

$(MAPS): $(PRETRAINED)
	$(SHARE) $(PY) export.py $(INPUT) --what reconstruction --weights $^ --out $@ --update

$(RUNS)/samples: $(READY) $(RUNS)/.made-by-make
	$(PY) simulate.py --model Model_II --per-class 5 --seed 1 --layout folder --out $@ --update

# On a few images: freshly simulated, or those of a packed data set, or the first of every class folder.
$(PREDICTIONS): $(MODEL) $(MAPS) $(SAMPLES)
	@rm -f $@
	folder=$(FOLDER); set --; \
	if [ -f "$$folder/dataset.json" ]; then set -- "$$folder/images.npy"; else \
	  for class in "$$folder"/*/ "$$folder"/*/*/; do n=0; for file in "$$class"*; do case "$$file" in \
	    *.[nN][pP][yYzZ]|*.[fF][iI][tT]*|*.[fF][tT][sS]*|*.[fF][zZ]) \
	      if [ $$n -lt 5 ] && [ -f "$$file" ]; then set -- "$$@" "$$file"; n=$$((n + 1)); fi;; \
	  esac; done; done; [ $$# -gt 0 ] || set -- "$$folder"; fi; \
	$(PY) predict.py --model $(MODEL) --maps $(MAPS) --sheet $(@D)/sheet.png --out $@ -- "$$@" \
	  || [ $$? -eq 1 -a -s $@ ]  # 1: some files could not be read, which predict.py says

# Of a whole make reproduce; models/README.md says of which.
models:
	cp $(MODEL) $(MAPS) $(PRETRAINED) $(RESIDUAL) models/
	cp $(RUNS)/evaluation/comparison.md models/
	rm -rf models/examples
	$(PY) simulate.py --model Model_II --per-class 3 --seed 1000 --layout folder --out models/examples
	$(PY) simulate.py --model Model_II --per-class 1 --seed 1000 --layout folder --noise --out models/examples/with_noise
	rm -f models/examples/.simulated.json models/examples/with_noise/.simulated.json
	cd models && sha256sum *.onnx *.pth > SHA256SUMS

# For any static host; it needs Node.js for npm once.
page: examples/node_modules/.package-lock.json
	@$(PYTHON) examples/page.py models $(RUNS) --out page

examples/node_modules/.package-lock.json: examples/package-lock.json
	npm ci --prefix examples --ignore-scripts --no-audit --no-fund

# The parts are independent, so -j runs them side by side.
study: $(STUDY_PARTS:%=study-%)
	$(PY) experiments/results.py --out $(RUNS)/study/results $(STUDY_PARTS:%=$(RUNS)/study/%/results)

$(SEEDS:%=study-all-%): study-all-%: $(IMAGES)
	$(SHARE) $(PY) experiments/study.py $(INPUT) --out $(RUNS)/study/all-$* --seeds $* \
	  $(if $(UNSEEN),--unseen $(call quoted,$(value UNSEEN))) $(if $(CUTOUTS),--cutouts $(call quoted,$(value CUTOUTS))) \
	  --only strategies scratch without_labels mistakes labels labels_all_classes unfamiliar

study-instruments: $(IMAGES)
	$(SHARE) $(PY) experiments/study.py $(INPUT) --out $(RUNS)/study/instruments --seeds $(SEEDS) --only instruments

# From simulated images, as pictures show them, to predictions for real ones.
ifneq ($(filter real,$(MAKECMDGOALS)),)
$(if $(shell test -e $(call quoted,$(value REAL)) && echo found),,$(error name a file of real images: make real REAL=file.npz))
endif
real: $(REAL_ANSWERS)

$(REAL_ANSWERS): $(RUNS)/real-%.csv: $(PICTURES)-%/vit-mae-classifier-wt.pth
	$(PY) experiments/real_images.py classify --images $(call quoted,$(value REAL)) --weights $^ --out $@

$(PICTURES)/dataset.json: $(RUNS)/data/dataset.json
	$(PY) experiments/real_images.py pictures --any --data $(RUNS)/data --out $(@D) --update

$(PICTURES)-pretrain/vit-mae-wt.pth: $(PICTURES)/dataset.json
	$(PY) pretrain.py --data $(PICTURES) --out $(@D) --update

$(PICTURES)-full/vit-mae-classifier-wt.pth $(PICTURES)-residual/vit-mae-classifier-wt.pth: \
  $(PICTURES)-%/vit-mae-classifier-wt.pth: $(PICTURES)-pretrain/vit-mae-wt.pth
	$(SHARE) $(PY) finetune.py --data $(PICTURES) --pretrained $^ --strategy $* $(if $(filter full,$*),--epochs 12) \
	  --out $(@D) --update

# In an environment of its own, with the peers.
bench: $(READY) $(PEERS)/ready $(RUNS)/.made-by-make
	$(PEERS)/bin/python experiments/bench.py --out $(RUNS)/bench

# A process per core; each test file stays in one, since its tests share what they trained.
test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadfile tests

test-heavy: export HEAVY := 1
test-heavy: export KILLS := 20
test-heavy: export FUZZED_FILES := 200000
test-heavy: export PREDICT_IMAGES := 200000
test-heavy: test

# In a folder that make created itself, what the stages leave there.
MADE := quick many-lenses many-lenses.onnx pairs sharpen-pretrain sharpen sharpen-evaluation sharpen.onnx demo data samples cache pretrain head layernorm full residual scratch evaluation residuals classifier.onnx \
  mass mass-evaluation mass.onnx reconstruction.onnx predictions.csv predictions.csv.errors.csv sheet.png study pictures pictures-pretrain \
  pictures-full pictures-residual real-full.csv real-residual.csv bench
clean:
	@if [ ! -e $(RUNS)/.made-by-make ]; then echo 'nothing removed: make did not create a folder $(RUNS)'; exit; fi; \
	rm -rf $(MADE:%=$(RUNS)/%); \
	if [ "$$(ls -A $(RUNS))" = .made-by-make ]; then rm -r $(RUNS); else echo '$(RUNS) keeps what make did not make'; fi

$(RUNS)/.made-by-make:
	@[ -e $(RUNS) ] || { mkdir -p $(RUNS) && touch $@; }

$(READY): requirements.txt
	@echo 'making $(VENV) from requirements.txt; torch takes minutes'
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(SMALL)/ready: requirements-predict.txt
	@echo 'making $(SMALL) from requirements-predict.txt: half a minute'
	@$(PYTHON) -m venv $(SMALL)
	@$(SMALL)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-predict.txt
	@touch $@

$(PEERS)/ready: requirements.txt experiments/requirements-bench.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	-$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r experiments/requirements-bench.txt
	touch $@
