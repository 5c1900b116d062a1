"""Rank by the titles of a dataset alone, with nothing trained: the room that a language model has.

    python -m benchmarks.titles data/ml-100k --llm cache/smollm2-135m --encoder cache/minilm \\
        --run runs/quickstart/sasrec

Ranks each user's test candidates by the cosine of their title vectors with the sum of those of the last ten items, for
several layers of the language model, alone and added to the scores of a trained run, both standardized per user. What
the sum gains is known to the titles and not to the run.

Letters: N items, D width, U users, C candidates.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, AutoTokenizer

from trainer.data.reading.dataset import Dataset, open_dataset
from trainer.data.reading.histories import Histories, Users
from trainer.data.reading.shards import read_in_order
from trainer.distributed import alone
from trainer.evaluation.ranking import Ranks, bootstrap, metrics_per_target
from trainer.runs.preflight import check_saved_run
from trainer.workflows.load_run import load_run

Floats = npt.NDArray[np.float64]

HISTORY = 10
WIDTH = 128
"""Principal components that are kept, each with the same variance: the frequent words of all titles would otherwise
dominate."""
BATCH = 64
WEIGHTS = (0.25, 0.5, 1.0)
"""Weights of the titles' scores beside the run's."""


def main() -> None:
    """Print one line per kind of vector."""
    parser = argparse.ArgumentParser(prog="benchmarks.titles", description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="dataset folder")
    parser.add_argument("--llm", required=True, help="folder of a causal language model")
    parser.add_argument("--encoder", help="folder of a text encoder, for comparison")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 3, 30], help="0: token embeddings")
    parser.add_argument("--run", type=Path, help="trained run on this dataset, such as SASRec")
    options = parser.parse_args()
    world = alone(1)
    dataset = open_dataset(options.data, full_check=False)
    users = Users.concatenate(list(read_in_order(dataset.path, dataset.manifest)))
    histories, target_U = users.targets("test")
    negative_UC = dataset.candidates_of("retrieval", "test", histories.user_U)
    candidate_UC = np.concatenate([target_U[:, None], negative_UC], axis=1)
    of_run = None
    if options.run is not None:
        run = load_run(check_saved_run(options.run), world)
        _, user_UD = run.evaluator.at_current_weights(kept=run.kept).user_vectors("test")
        of_run = _scores(user_UD.double().numpy(), run.item_vectors.double().cpu().numpy(), candidate_UC)
        print(f"{options.run}: NDCG@10 {_ndcg(of_run)}")
    kinds = {
        f"{pooling} of layer {layer}": _equal_variance(vector_ND)
        for pooling in ("mean", "last token")
        for layer, vector_ND in _title_vectors(options.llm, dataset, options.layers, pooling).items()
    }
    if options.encoder:
        [(_, vector_ND)] = _title_vectors(options.encoder, dataset, [-1], "mean").items()
        kinds["encoder"] = vector_ND - vector_ND.mean(0)
    for name, vector_ND in kinds.items():
        item_ND = vector_ND / np.linalg.norm(vector_ND, axis=1, keepdims=True)
        titles = _scores(_sums(histories, item_ND), item_ND, candidate_UC)
        both = "" if of_run is None else ", ".join(f"{w:g}: {_ndcg(of_run + w * titles)}" for w in WEIGHTS)
        print(f"{name:<22} {_ndcg(titles)}" + (f"   with the run, by weight: {both}" if both else ""), flush=True)


@torch.no_grad()
def _title_vectors(path: str, dataset: Dataset, layers: Sequence[int], pooling: str) -> dict[int, Floats]:
    """(N, D) vectors of all titles, by layer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    model: Any = AutoModel.from_pretrained(path, dtype=torch.bfloat16, trust_remote_code=False).eval()
    parts: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    for start in range(0, dataset.num_items, BATCH):
        titles = list(dataset.titles[start : start + BATCH])
        batch = tokenizer(titles, padding=True, truncation=True, max_length=64, return_tensors="pt")
        states = model(**batch, output_hidden_states=True).hidden_states
        real_BT1 = batch["attention_mask"][:, :, None].float()
        for layer in layers:
            state_BTD = states[layer].float()
            mean_BD = (state_BTD * real_BT1).sum(1) / real_BT1.sum(1)
            parts[layer].append(mean_BD if pooling == "mean" else state_BTD[:, -1])
    return {layer: torch.cat(part).double().numpy() for layer, part in parts.items()}


def _equal_variance(vector_ND: Floats) -> Floats:
    left, _, _ = np.linalg.svd(vector_ND - vector_ND.mean(0), full_matrices=False)
    components: Floats = left[:, :WIDTH]
    return components


def _sums(histories: Histories, item_ND: Floats) -> Floats:
    """(U, D) sums over the latest items."""
    padded: Floats = np.concatenate([np.zeros((1, item_ND.shape[1])), item_ND])
    sums: Floats = padded[histories.padded(HISTORY)].sum(1)
    return sums


def _scores(user_UD: Floats, item_ND: Floats, candidate_UC: npt.NDArray[np.int64]) -> Floats:
    """(U, C) scores, standardized per user."""
    score_UC = np.einsum("ud,ucd->uc", user_UD, item_ND[candidate_UC - 1])
    standardized: Floats = (score_UC - score_UC.mean(1, keepdims=True)) / score_UC.std(1, keepdims=True)
    return standardized


def _ndcg(score_UC: Floats) -> str:
    target_U1, other_UC = score_UC[:, :1], score_UC[:, 1:]
    greater_U, ties_U = (other_UC > target_U1).sum(1), (other_UC == target_U1).sum(1)
    ranks = Ranks(greater_U, ties_U, np.full(len(score_UC), score_UC.shape[1]))
    found = bootstrap(metrics_per_target(ranks)["NDCG@10"], seed=0)
    return f"{found.value:.4f} ±{found.half_width:.4f}"


if __name__ == "__main__":
    main()
