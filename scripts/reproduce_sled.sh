#!/usr/bin/env bash
# SLED's comparison on Llama 2 (arXiv 2411.02433, versions 1 and 2: version 3 has no Llama figures any more).
#
#   scripts/reproduce_sled.sh 7b PRIMERS          # or 7b-chat, 13b, 13b-chat, 70b, 70b-chat
#
# NOT RUN by this project: the weights are gated, and no machine for them was at hand. PRIMERS is a folder with the
# scripts of DoLa that hold the demonstrations: tfqa_mc_eval.py, strqa_eval.py, gsm8k_eval.py (see docs/protocols.md,
# which also says in what our scoring differs from the authors').
#
# Rates and scales are those of the authors' scripts/*.sh. Expected: see the result tables of the paper. Independent
# reruns got, last layer -> SLED, for 7b: StrategyQA 60.7 -> 61.3, GSM8K 14.0 -> 14.6, FACTOR wiki 58.4 -> 67.0.
# Each comparison has the last layer alone and the clamp alone beside it: SLED's top tokens without its evolution. Compare
# SLED with that before you credit the layers.
set -euo pipefail
size=${1:?which model: 7b, 7b-chat, 13b, 13b-chat, 70b or 70b-chat}
primers=${2:?the folder with tfqa_mc_eval.py, strqa_eval.py and gsm8k_eval.py}
case $size in    #          FACTOR          TruthfulQA        StrategyQA        GSM8K     as "rate scale"; layers
  7b)       factor="2 10"; truthful="2.5 75";  strategy="1.75 5";  gsm="2 10";   layers=32 ;;
  7b-chat)  factor="2 10"; truthful="2.5 75";  strategy="2.5 10";  gsm="1 5";    layers=32 ;;
  13b)      factor="2 10"; truthful="2.5 100"; strategy="2.75 5";  gsm="2 5";    layers=40 ;;
  13b-chat) factor="2 10"; truthful="2.5 50";  strategy="1.5 10";  gsm="0.25 5"; layers=40 ;;
  70b)      factor="2 10"; truthful="2 50";    strategy="0.25 10"; gsm="2 10";   layers=80 ;;
  70b-chat) factor="2 10"; truthful="2 50";    strategy="0.14 10"; gsm="0.5 50"; layers=80 ;;
  *) echo "no settings for $size" >&2; exit 2 ;;
esac

compare() {   # compare TASK LOWER_BOUND RATE SCALE [more options of sled]
  local task=$1 bound=$2 rate=$3 scale=$4; shift 4
  local eval=(sled eval --model "meta-llama/Llama-2-$size-hf" --tasks "$task")
  case $task in
    truthfulqa*) eval+=(--metadata "primer_file=$primers/tfqa_mc_eval.py" --raw-scores) ;;  # sums of logits
    strategyqa*) eval+=(--metadata "primer_file=$primers/strqa_eval.py") ;;
    gsm8k*)      eval+=(--metadata "primer_file=$primers/gsm8k_eval.py") ;;
  esac
  "${eval[@]}" --out "$task-dola" --fusion dola --layers $(seq 0 $((layers - 1))) --lower-bound -1000   # all layers, as in their scripts
  "${eval[@]}" --out "$task-sled" --fusion sled --rate "$rate" --scale "$scale" --lower-bound "$bound" "$@"
}

compare factor_wiki -2500 $factor
compare truthfulqa_mc123 -100 $truthful --steps 10
compare strategyqa_cot6 -1000 $strategy
compare gsm8k_cot8 -1000 $gsm
