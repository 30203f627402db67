#!/usr/bin/env bash
# LayerSkip's self-speculation on its published checkpoints (arXiv 2404.16710): acceptance and speed, batch 1, greedy.
#
#   scripts/reproduce_layerskip.sh [facebook/layerskip-llama2-7B] [PROMPTS]
#
# NOT RUN by this project: the weights are gated, and no machine for them was at hand.
#
# Expected for layerskip-llama2-7B: CNN/DM, exit 8, 12 drafted: 68.9% accepted, 1.86 times as fast as without;
# HumanEval, exit 8, 6 drafted: 67.1%, 1.83 times. For other sizes see the paper's tables. PROMPTS is a file with a
# prompt per line (\n for a line break), by default HumanEval's own; how the authors ask for CNN/DM is not known here.
# Each run ends with its acceptance and tokens per second, compilation included: with many prompts a small part.
set -euo pipefail
model=${1:-facebook/layerskip-llama2-7B}
prompts=${2:-humaneval.txt}
[ -e "$prompts" ] || python - "$prompts" <<'PYTHON'
import sys
import datasets
rows = datasets.load_dataset("openai/openai_humaneval", split="test")
with open(sys.argv[1], "w") as file:
    file.writelines(row["prompt"].replace("\n", "\\n") + "\n" for row in rows)
PYTHON

generate=(sled generate --model "$model" --file "$prompts" --batch-size 1 --max-new-tokens 512 --json)
"${generate[@]}" > plain.jsonl   # the baseline: no early exit
"${generate[@]}" --exits speculate --exit-layers 8 --draft 6 > exit8-draft6.jsonl
"${generate[@]}" --exits speculate --exit-layers 8 --draft 12 > exit8-draft12.jsonl
