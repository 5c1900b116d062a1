"""Train a SASRec from Python, look at how it ranks, ask it for recommendations, and retrain it on new data.

A notebook in percent format: runs from top to bottom (`python examples/train_and_query.py [DATASET [RUN]]`), or cell by
cell in an editor that knows `# %%` (VS Code, PyCharm, Spyder, or Jupyter with jupytext). The dataset is
MovieLens-100k, which `make quickstart` or `python -m shards demo data/ml-100k` builds. docs/python_api.md has the rest.
"""

# %% A run is a configuration: a preset, and what differs from it. A finished run is not trained again.
import sys
from pathlib import Path

import trainer

words = [] if "ipykernel" in sys.modules else sys.argv[1:]  # a kernel has arguments of its own
dataset = Path(words[0] if words else "data/ml-100k")
output = Path(words[1] if len(words) > 1 else "runs/example/sasrec")
settings = [f"data.path={dataset}", "engine.threads=1"]  # more threads would wait for each other: the model is tiny
config = trainer.load_config("quickstart_sasrec", [*settings, f"output={output}", "train.max_steps=200"])
print(f"{config.system.name}, batches of {config.train.batch_size} users, judged by {config.train.metric}")
run = trainer.train(config)

# %% Later, or elsewhere: open it by its folder. The model is loaded when it is first needed.
run = trainer.load_run(output)
print(run)

# %% Does it use the order of a history? Rank the test items after histories as they are, and after shuffled ones.
original, shuffled = run.evaluate()["test"].metrics, run.evaluate(history="shuffled")["test"].metrics
for metric in ("NDCG@10", "HR@10"):
    before, after = original[metric].value, shuffled[metric].value
    print(f"{metric}: {before:.4f}, {after:.4f} with shuffled histories ({after / before - 1:+.1%})")

# %% Recommendations for a user of the dataset, by the id in the reviews.
[answer] = run.recommend(users=[run.user_ids[0]], k=5)
print(f"user {answer.user_id} last saw {answer.history[-1].title}")
for item in answer.recommendations:
    print(f"  {item.rank}. {item.title} (id {item.item_id}, {item.score:.3f})")

# %% For anyone else, by what they have seen: ids or titles, oldest first. Unknown ones are refused, with a suggestion.
seen = run.items.titles[:3]
[answer] = run.recommend([trainer.History(seen, times=["2024-05-01", "2024-05-02", "2024-05-03"])], k=3)
print(f"after {', '.join(seen)}: {', '.join(item.title for item in answer.recommendations)}")
try:
    run.recommend([[seen[0], seen[1][:-1] + "?"]])
except ValueError as error:
    print(f"refused: {error}")

# %% Item vectors, to use elsewhere. The score of an item is the inner product of the two vectors.
items = run.item_vectors()
score = run.user_vectors([seen])[0] @ items.vectors.T
print(f"item vectors: {items.vectors.shape}, the best item is {items.titles[score.argmax()]}")

# %% Next week: the same, from this run's weights, on a dataset with new users and items (here: the same one again).
again = [f"output={output}-next", f"train.init_from={output}", "train.max_steps=20"]
warm = trainer.train("quickstart_sasrec", [*settings, *again])
print(f"retrained: NDCG@10 {warm.evaluate()['test'].metrics['NDCG@10'].value:.4f}")
