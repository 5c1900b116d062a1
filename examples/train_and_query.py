"""Train a SASRec from Python, look at how it ranks, and ask it for recommendations.

Runs from top to bottom (`python examples/train_and_query.py [DATASET [RUN]]`), or cell by cell in an editor that knows
`# %%`. The dataset is MovieLens-100k, which `make quickstart` or `python -m shards demo data/ml-100k` builds.
"""

# %% A run is a configuration: a preset, and what differs from it.
import sys
from pathlib import Path

from trainer.config import load_config
from trainer.runs.preflight import check_saved_run, preflight

dataset = Path(sys.argv[1] if len(sys.argv) > 1 else "data/ml-100k")
output = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/example/sasrec")
config = load_config(Path("quickstart_sasrec"), [f"data.path={dataset}", f"output={output}", "train.max_steps=200"])
print(f"{config.system.name}, batches of {config.train.batch_size} users, judged by {config.train.metric}")

# %% The preflight refuses what cannot work, before anything expensive starts. Training again resumes, or does nothing.
checked = preflight(config, ranks=1)

from trainer.workflows.train import train  # noqa: E402 - torch is imported here, after the preflight

ended = train(checked)
assert ended, "nobody sent a signal"

# %% The trained run: its best checkpoint, and an evaluator over its dataset.
from trainer.distributed import start, stop  # noqa: E402
from trainer.workflows.load_run import load_run  # noqa: E402

run = load_run(check_saved_run(output), start())
print(f"best checkpoint: step {run.checkpoint.progress.step}")

# %% Does it use the order of a history? Rank the test items after histories as they are, and after shuffled ones.
ranking = run.evaluator.at_current_weights()
original, shuffled = (
    ranking.evaluate("test", order).means(run.config.evaluation) for order in ("original", "shuffled")
)
for metric in ("NDCG@10", "HR@10"):
    change = shuffled[metric] / original[metric] - 1
    print(f"{metric}: {original[metric]:.4f}, {shuffled[metric]:.4f} with shuffled histories ({change:+.1%})")

# %% Recommendations for a user, by the id in the reviews.
import polars as pl  # noqa: E402
from trainer.workflows.recommend import recommend  # noqa: E402

raw_user = pl.read_parquet(dataset / "users.parquet")["raw_id"][0]
answer = recommend(run, raw_user, top=5)
print(f"user {raw_user} last saw {answer.history[-1].title}")
for item in answer.recommendations:
    print(f"  {item.rank}. {item.title} ({item.score:.3f})")

# %% Item vectors, to use elsewhere: row i is item i + 1 of the catalog.
print(f"item vectors: {tuple(run.item_vectors.shape)}")
stop()
