#!/usr/bin/env bash
# DoLa's comparison on LLaMA 1 (arXiv 2309.03883).
#
#   scripts/reproduce_dola.sh 7b PRIMERS          # or 13b, 30b, 65b
#
# NOT RUN by this project: no machine for these weights was at hand. PRIMERS as in scripts/reproduce_sled.sh.
#
# Layers, relative top and repetition penalty are those of the authors' README and code. Expected: see the result
# tables of the paper; its abstract claims 12 to 17 points on TruthfulQA.
set -euo pipefail
size=${1:?which model: 7b, 13b, 30b or 65b}
primers=${2:?the folder with tfqa_mc_eval.py, strqa_eval.py and gsm8k_eval.py}
case $size in
  7b)  low=$(seq 0 2 14); high=$(seq 16 2 30) ;;
  13b) low=$(seq 0 2 18); high=$(seq 20 2 38) ;;
  30b) low=$(seq 0 2 18); high=$(seq 40 2 58) ;;
  65b) low=$(seq 0 2 18); high=$(seq 60 2 78) ;;
  *) echo "no settings for $size" >&2; exit 2 ;;
esac
eval=(sled eval --model "huggyllama/llama-$size" --tasks)

for part in wiki news; do
  "${eval[@]}" factor_$part --out "factor_$part" --fusion dola --layers $low --lower-bound -1000
done

# Their code filters nothing here; the smallest share does the same.
"${eval[@]}" truthfulqa_mc123 --metadata "primer_file=$primers/tfqa_mc_eval.py" --out truthfulqa --fusion dola --layers $high \
  --relative-top 1e-30 --lower-bound -1000

for task in strategyqa_cot6=strqa_eval gsm8k_cot8=gsm8k_eval; do
  "${eval[@]}" "${task%=*}" --metadata "primer_file=$primers/${task#*=}.py" --out "${task%=*}" --fusion dola --layers $low \
    --repetition-penalty 1.2
done
