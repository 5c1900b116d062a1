# %% [markdown]
"""
# From a shop's log to recommendations over HTTP

And a week later the same again, with new items. Each step names the command that does the same. The log is made up
here: 300 users of a tool shop, in csv files as any shop could export them. It takes two minutes on a laptop, and writes
to the folder `runs/journey`. Serving needs the extra `serve`: `pip install 'llm-srec-trainer[serve]'`.

`journey.ipynb` is generated from `journey.py`, which also runs as a script: `python examples/journey.py [FOLDER]`.
"""

# %% [markdown]
# ## The log
#
# Who took what and when, and what things are called.

# %%
import csv
import json
import random
import subprocess
import sys
import urllib.request
from pathlib import Path

import trainer
from shards.__main__ import main as shards

words = [] if "ipykernel" in sys.modules else sys.argv[1:]  # a kernel has arguments of its own
folder = Path(words[0] if words else "runs/journey")
folder.mkdir(parents=True, exist_ok=True)
KINDS = ("hammer", "saw", "drill", "file", "plane", "chisel", "clamp", "rule", "level", "vice")
MAKERS = ("Amber", "Brass", "Cedar", "Denim", "Ember")
WEEK = 7 * 24 * 3600


def write_log(path: Path, names: list[str], weeks: range) -> None:
    """Users tend to go on to the next kind of tool of the same maker; each takes an item or two per week."""
    generator = random.Random(weeks.start)
    with (path / f"log-{weeks.stop}.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["customer", "article", "when"])
        for user in range(300):
            item = generator.randrange(len(names))
            for week in weeks:
                item = (item + 1) % len(names) if generator.random() < 0.8 else generator.randrange(len(names))
                rows.writerow([f"c{user:03}", f"A-{item:03}", 1_700_000_000 + week * WEEK + user])
    with (path / f"articles-{weeks.stop}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["article", "title"], *([f"A-{i:03}", name] for i, name in enumerate(names))])


names = [f"{maker} {kind}" for maker in MAKERS for kind in KINDS]
write_log(folder, names, range(12))


# %% [markdown]
# ## Build a dataset
#
# `llm-srec shards build DATASET --source table --reviews LOG --meta ARTICLES ...`


# %%
def build(week: int) -> Path:
    """The dataset of the log up to a week."""
    dataset = folder / f"dataset-{week}"
    if not dataset.exists():
        columns = "--user-column customer --item-column article --time-column when"
        files = ["--reviews", str(folder / f"log-{week}.csv"), "--meta", str(folder / f"articles-{week}.csv")]
        options = f"--source table {columns} --negatives 20 --title-negatives 5 --name shop".split()
        assert shards(["build", str(dataset), *files, *options]) == 0
    return dataset


# %% [markdown]
# ## Train
#
# `llm-srec train sasrec data.path=DATASET output=RUN ...`


# %%
def train(week: int, *more: str) -> trainer.Run:
    """A small SASRec, tested at the end."""
    settings = ["system.dim=32", "system.max_length=20", "train.epochs=30", "train.lr=0.003", "train.validate_every=5"]
    paths = [f"data.path={build(week)}", f"output={folder / f'run-{week}'}", "engine.threads=1"]
    return trainer.train("sasrec", [*settings, *paths, *more])


run = train(12)
metrics = json.loads((run.path / "results.jsonl").read_text().splitlines()[0])["metrics"]
print(f"HR@10 {metrics['HR@10']['value']:.2f}, MRR {metrics['MRR']['value']:.2f}")

# %% [markdown]
# ## Recommend
#
# After a history that someone types: `llm-srec recommend RUN --history "Amber hammer" "Amber saw"`

# %%
[answer] = run.recommend([["Amber hammer", "Amber saw"]], k=3)
print("after a hammer and a saw:", ", ".join(item.title for item in answer.recommendations))

# %% [markdown]
# ## Export, and load what was exported
#
# `llm-srec export RUN EXPORT`

# %%
path = folder / "export-12"
exported = trainer.load_run(path) if path.exists() else run.export(path)
assert exported.recommend([["Amber hammer", "Amber saw"]], k=3) == [answer]
print(f"{path}: {len(exported.items)} items, vectors of {exported.item_vectors().vectors.shape[1]}")

# %% [markdown]
# ## Serve it, and ask
#
# `llm-srec serve EXPORT`, then `curl localhost:8000/recommend --json '{"history": [...]}'`

# %%
command = [sys.executable, "-m", "launchers.serve", str(path.absolute()), "--port", "0"]
with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(trainer.__file__).parents[1]) as server:
    assert server.stdout is not None
    address = server.stdout.readline().split()[-1]  # "serving EXPORT on http://127.0.0.1:PORT"
    body = json.dumps({"history": ["Amber hammer", "Amber saw"], "k": 3}).encode()
    request = urllib.request.Request(f"{address}/recommend", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as response:
        served = json.load(response)
    server.terminate()
print(f"{address}: {', '.join(item['title'] for item in served['recommendations'])}; ended with {server.returncode}")
assert [item["item_id"] for item in served["recommendations"]] == [i.item_id for i in answer.recommendations]

# %% [markdown]
# ## A week later
#
# There are new articles: build again, and start from the last run: `llm-srec train ... train.init_from=RUN`

# %%
write_log(folder, [*names, "Amber torch", "Brass torch"], range(1, 13))
newer = train(13, f"train.init_from={run.path}", "train.epochs=10")
carried = json.loads((newer.path / "warm_start.json").read_text())
print(f"a week later: {carried['items_carried']} articles carried over, {carried['items_new']} new")
[answer] = newer.recommend([["Amber torch"]], k=3)
print("after a torch:", ", ".join(item.title for item in answer.recommendations))
