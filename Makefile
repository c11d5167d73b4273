# make demo        all stages on a small rendered world, on two CPU cores; QUICK=1: every stage for seconds;
#                  DEVICE=cuda: on a GPU, in bfloat16
# make test        a virtual environment, the packages, the linter, all tests but test-tables; about ten minutes
# make test-fast   the same without the slow tests (kills, several processes); under 2 minutes
# make fuzz        20,000 damaged inputs of everything that reads files; three minutes
# make test-tables  a row of each of the long tables below, at tiny sizes; minutes
# make test-gpu    training on a GPU against the CPU
# make demo-seeds  the Libra stages with two more seeds: mean and spread
# make ablate      Table 3: Libra and seven rows, three seeds; hours
# make compare     Libra, HaploVL, HoVLE and a LLaVA-like model side by side, three seeds; under two hours
# make demo-llm    a real language model, SmolLM2-135M, learns to see, and is asked what it knew before; hours
# make bench       speed and memory, each against something named; minutes
# make clean-demo  remove the demo's files

PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python
TOY ?= runs/toy

ifneq ($(filter-out 0,$(QUICK)),)
TOY = runs/quick
WORLD = --captions 64 --chats 64 --questions 46 --llama-steps 5 --clip-steps 5
QUICK_TOKENIZER = --steps 5 --warmup 1 --disc-start 3
QUICK_STAGE = --steps 5 --warmup 1
LIMIT = --limit 8
endif

# The recipes of the small world. Those of the paper are the scripts' defaults.
TOKENIZER = --steps 1900 --batch 16 --warmup 30 --lr 7e-4 --entropy-weight 1 --l2-weight 5 --clip-weight 2 \
	--disc-start 1780 --disc-weight 0.2 --sample-every 500
PRETRAIN = --steps 1100 --batch 32 --warmup 60 --lr 2e-3 --weight-decay 0 --text-to-image 0.5 --vision-down-ratio 1 \
	--val-data $(TOY)/eval/held_out_captions.json --images $(TOY)/eval --val-every 550
SFT = --steps 1000 --batch 16 --warmup 60 --lr 1.5e-3 --weight-decay 0 --val-data $(TOY)/chats/held_out.json --val-every 250

# SmolLM2; on a CPU with fast products of bfloat16 (AMX) LLM_DTYPE=bfloat16 may be faster. Where there is no C++
# compiler LLM_COMPILE= leaves --compile out, and a step takes an eighth longer
LLM_DTYPE ?= float32
LLM_COMPILE ?= --compile
LLM = --warmup 40 --weight-decay 0 --dtype $(LLM_DTYPE) $(LLM_COMPILE) --save-every 100 --sample-every 0
LLM_PRETRAIN = $(LLM) --batch 8 --steps 700 --lr 1e-3 --text-to-image 0.35
LLM_FROZEN = $(LLM) --batch 4 --steps 1000 --lr 5e-4
LLM_TUNED = $(LLM) --batch 4 --steps 450 --lr 2e-4

# A GPU that happens to be there would take the demo, in bfloat16
DEVICE ?= cpu
ifeq ($(DEVICE),cpu)
demo demo-seeds demo-llm ablate compare: export CUDA_VISIBLE_DEVICES =
endif

demo: $(VENV)/run
	@mkdir -p $(TOY) && date +%s > $(TOY)/.began
	$(RUN) -m toy.make --out $(TOY) $(WORLD)
	test -f $(TOY)/tokenizer/model.safetensors || $(RUN) train_tokenizer.py --clip $(TOY)/clip \
		--data '$(TOY)/captions/*.tar' --out $(TOY)/tokenizer --resume $(TOKENIZER) $(QUICK_TOKENIZER)
	test -f $(TOY)/pretrain/model.safetensors || $(RUN) pretrain.py --llm $(TOY)/llama \
		--image-tokenizer $(TOY)/tokenizer --data '$(TOY)/captions/*.tar' --out $(TOY)/pretrain --resume \
		$(PRETRAIN) $(QUICK_STAGE)
	test -f $(TOY)/sft/model.safetensors || $(RUN) sft.py --model $(TOY)/pretrain --data $(TOY)/chats/chat.json \
		--images $(TOY)/chats/images --out $(TOY)/sft --resume $(SFT) $(QUICK_STAGE)
	$(RUN) -m toy.other_renderer --out $(TOY)/foreign
	test $(TOY)/report.json -nt $(TOY)/sft/model.safetensors || \
		$(RUN) -m toy.report --toy $(TOY) --began $$(cat $(TOY)/.began) $(LIMIT)
	@echo "demo took $$(( ($$(date +%s) - $$(cat $(TOY)/.began)) / 60 )) minutes; look at $(TOY)/report.png"
	@echo "Ask it something: $(RUN) generate.py --model $(TOY)/sft --image $(TOY)/eval/images/000000000000.png"
	@rm -f $(TOY)/.began
ifneq ($(filter-out 0,$(QUICK)),)
	@echo "QUICK=1 only shows that every stage runs: nothing was learned."
endif

# The two Libra stages again with other seeds, over the same stand-ins: the report's numbers, mean and spread
demo-seeds: demo
	set -e; for seed in 1 2; do \
		to=$(TOY)/seed$$seed; \
		test -f $$to/pretrain/model.safetensors || $(RUN) pretrain.py --llm $(TOY)/llama --image-tokenizer $(TOY)/tokenizer \
			--data '$(TOY)/captions/*.tar' --out $$to/pretrain --resume --seed $$seed $(PRETRAIN) $(QUICK_STAGE); \
		test -f $$to/sft/model.safetensors || $(RUN) sft.py --model $$to/pretrain --data $(TOY)/chats/chat.json \
			--images $(TOY)/chats/images --out $$to/sft --resume --seed $$seed $(SFT) $(QUICK_STAGE); \
		$(RUN) -m toy.report --toy $(TOY) --models $$to --seed $$seed $(LIMIT); \
	done
	$(RUN) -m toy.report --mean $(TOY) $(TOY)/seed1 $(TOY)/seed2

# Table 3 at 400 and 500 of the demo's 1,100 and 1,000 steps, three seeds of eight rows: over two hours on two cores
ablate: demo
	$(RUN) -m toy.ablate --toy $(TOY) --out $(TOY)/ablation --tokenizer "$(TOKENIZER) $(QUICK_TOKENIZER)" \
		--pretrain "$(PRETRAIN) --steps 400 --text-to-image 0.35 $(QUICK_STAGE)" \
		--sft "$(SFT) --steps 500 $(QUICK_STAGE)"

# The demo's CLIP, image tokenizer and pictures around a language model that people use; gguf is in the test environment
demo-llm: demo $(VENV)/test
	test -f $(TOY)/smollm2/config.json || $(RUN) -m toy.smollm2 --out $(TOY)/smollm2 --packages $(TOY)/packages
	$(RUN) -m toy.real_llm --toy $(TOY) --out $(TOY)/real-llm --llm $(TOY)/smollm2 --packages $(TOY)/packages \
		--pretrain "$(LLM_PRETRAIN) $(QUICK_STAGE)" --frozen "$(LLM_FROZEN) $(QUICK_STAGE)" \
		--tuned "$(LLM_TUNED) $(QUICK_STAGE)" $(LIMIT)

# Four systems, and two of them without one of their stages
compare: demo
	$(RUN) -m toy.compare --toy $(TOY) --out $(TOY)/compare $(if $(LIMIT),--steps 2 --limit 23 --judge 23 --seeds 0)

# Speed and memory, as ratios; transformers is in the test environment
bench: $(VENV)/test
	mkdir -p runs && $(RUN) -m bench --out runs/bench.json

clean-demo:
	rm -rf $(TOY)

test test-fast: $(VENV)/test
	$(VENV)/bin/ruff check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile \
		-m "not $(if $(filter test-fast,$@),slow,tables)"

test-tables: $(VENV)/test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m tables

test-gpu: $(VENV)/test
	LIBRA_GPU=1 $(RUN) -m pytest -m gpu

fuzz: $(VENV)/test
	$(RUN) -W ignore tests/test_fuzz.py 20000

$(VENV)/run: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements.txt
	touch $@

$(VENV)/test: requirements-test.txt $(VENV)/run
	$(RUN) -m pip install -q -r requirements-test.txt
	touch $@

.PHONY: demo demo-seeds demo-llm ablate compare bench clean-demo test test-fast test-tables test-gpu fuzz
