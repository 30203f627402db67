#!/usr/bin/env bash
# The published protocols on a model for any machine, with the methods side by side; docs/protocols.md has the results.
#
#   scripts/reproduce_smollm2.sh DATA PRIMERS [MODEL]
#
# DATA holds expert_factor.csv, TruthfulQA.csv and GSM8K's test.jsonl, PRIMERS DoLa's scripts with the demonstrations,
# tfqa_mc_eval.py and gsm8k_eval.py. Settings are those that SLED's authors have for Llama 2 7B and DoLa's for LLaMA 7B;
# SLED also looks at every second, and at every fourth, early layer only. Answers are kept: after a kill, the same command
# goes on. Hours on two cores; FACTOR_LIMIT, TRUTHFUL_LIMIT and GSM_LIMIT ask only so many questions, the first.
set -euo pipefail
data=${1:?the folder with expert_factor.csv, TruthfulQA.csv and test.jsonl}
primers=${2:?the folder with tfqa_mc_eval.py and gsm8k_eval.py}
model=${3:-HuggingFaceTB/SmolLM2-135M-Instruct}
second=$(seq -s ' ' 0 2 28) fourth=$(seq -s ' ' 0 4 28)   # of 30 layers

compare() {   # compare TASK FILE LIMIT "SLED's settings" "DoLa's settings" [more options of sled]
  local task=$1 file=$2 limit=$3 sled="sled $4" dola="dola $5"; shift 5
  sled eval --model "$model" --dtype float32 --tasks "$task" --data "$data/$file" --limit "$limit" --out "smollm2-$task" \
    --time-samples 8 --fusion "$sled" "$sled --layers $second" "$sled --layers $fourth" "$dola" confident "$@"
}

compare factor_expert expert_factor.csv "${FACTOR_LIMIT:-236}" "--rate 2 --scale 10 --lower-bound -2500" "--lower-bound -1000"
compare truthfulqa_mc123 TruthfulQA.csv "${TRUTHFUL_LIMIT:-100}" "--rate 2.5 --scale 75 --steps 10 --lower-bound -100" \
  "--layers high --relative-top 1e-30 --lower-bound -1000" --raw-scores --metadata "primer_file=$primers/tfqa_mc_eval.py"
compare gsm8k_cot8 test.jsonl "${GSM_LIMIT:-100}" "--rate 2 --scale 10" "" --metadata "primer_file=$primers/gsm8k_eval.py"
