#!/usr/bin/env bash
# MovieLens-100k from reviews to a table of results, on CPU ranks. `make quickstart` calls it with .venv on the PATH.
# Run it again to resume where it stopped; finished steps are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

ranks=${RANKS:-2}
runs=runs/quickstart
page=$runs/page.html
presets=trainer/presets/movielens
# bf16 halves the time of LLM-SRec on CPUs that multiply it in hardware (AMX), and is far slower than fp32 on others.
dtype=float32
if grep -qsw amx_bf16 /proc/cpuinfo; then dtype=bfloat16; fi

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

say "1/7  Dataset: reviews -> catalog, sequences, shards, candidates"
[ -f data/ml-100k/manifest.json ] || python -m shards demo data/ml-100k
python -m shards stats data/ml-100k

say "2/7  Language model: SmolLM2-135M-Instruct, converted once"
[ -f cache/smollm2-135m/config.json ] || python launchers/demo_models.py llm cache/smollm2-135m

say "3/7  Teacher: SASRec, which reads 128 items"
python launchers/train.py $presets/quickstart_sasrec.yaml

say "4/7  A SASRec that reads ten items, as many as LLM-SRec"
python launchers/train.py $presets/quickstart_sasrec.yaml system.max_length=10 output=$runs/sasrec_10

say "5/7  LLM-SRec with the candidates of the paper, on $ranks ranks under DeepSpeed"
deepspeed --quiet --num_gpus "$ranks" launchers/train.py $presets/quickstart_llm_srec_paper.yaml system.llm.dtype=$dtype

say "6/7  LLM-SRec with the recipe of benchmarks/recipe.md"
deepspeed --quiet --num_gpus "$ranks" launchers/train.py $presets/quickstart_llm_srec.yaml system.llm.dtype=$dtype
python launchers/recommend.py $runs/llm_srec --user 196 --top 5

say "7/7  Results: 943 users, the last item of each among 99 others"
python launchers/report.py $runs/sasrec_10 $runs/sasrec $runs/llm_srec_paper $runs/llm_srec \
    --popularity --against $runs/llm_srec --metrics NDCG@10,HR@10

python launchers/page.py $runs/llm_srec $runs/sasrec $runs/sasrec_10 $runs/llm_srec_paper \
    --popularity --title "LLM-SRec on MovieLens-100k" --out $page >/dev/null

cat <<END

shuffled: the same model reads every history in a random order. What it loses, it had learned from the order.

All of it as one page, to open in a browser or to mail: $page

Next:
  tensorboard --logdir runs                                                  curves of all runs
  python launchers/evaluate.py runs/quickstart/llm_srec --candidates full    rank the full catalog
  deepspeed --quiet --num_gpus 2 launchers/train.py llm_srec                 your own LLM: see README.md
END
