#!/usr/bin/env bash
# MovieLens-100k from reviews to recommendations, on CPU ranks. `make quickstart` calls it with .venv on the PATH.
# Run it again to resume where it stopped; finished steps are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

ranks=${RANKS:-2}

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

say "1/5  Dataset: reviews -> catalog, sequences, shards, candidates"
[ -f data/ml-100k/manifest.json ] || python -m shards demo data/ml-100k
python -m shards stats data/ml-100k

say "2/5  Language model: SmolLM2-135M-Instruct, converted once"
[ -f cache/smollm2-135m/config.json ] || python launchers/demo_models.py llm cache/smollm2-135m

say "3/5  Teacher: SASRec"
python launchers/train.py trainer/presets/movielens/quickstart_sasrec.yaml

say "4/5  LLM-SRec on $ranks ranks under DeepSpeed"
deepspeed --num_gpus "$ranks" launchers/train.py trainer/presets/movielens/quickstart_llm_srec.yaml

say "5/5  Recommendations"
python launchers/recommend.py runs/quickstart/llm_srec --user 196 --top 5

cat <<'END'

Next:
  tensorboard --logdir runs                                                  curves of both runs
  python launchers/evaluate.py runs/quickstart/sasrec --candidates full      rank the full catalog
  deepspeed --num_gpus 2 launchers/train.py trainer/presets/llm_srec.yaml    your own LLM: see README.md
END
