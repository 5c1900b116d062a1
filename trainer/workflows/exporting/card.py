"""The model card of an export, in the form of the Hugging Face hub: YAML that the hub reads, then text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from shards.manifest import CATALOG_NAME, Manifest
from trainer.config import config_hash, extensions, reads_titles_alone
from trainer.config.schema import built_on
from trainer.reports.results import Result
from trainer.runs.exported import BaseModel
from trainer.runs.model_folder import may_be_hub_id
from trainer.runs.preflight import SavedRun
from trainer.workflows.exporting.checks import ExportOptions

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_SHOWN = ("HR@1", "HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20", "MRR")
"""Metrics in the card's table, where a result has them."""
_HEAD = ("HR@10", "NDCG@10")
"""Metrics in the card's YAML, which the hub shows beside the model."""
_FILES = {
    "weights.safetensors": "everything that was trained",
    "state.json": "step and identity of the checkpoint",
    "files.json": "sha256 of both",
    "export.json": "format, language model, sha256 of further files",
    "config.yaml": "every setting of the run",
    "items.parquet": "raw id, title and vector of every item",
    "item_vectors.npy": "the vectors alone",
    "metrics.json": "test results with intervals",
    "index.faiss": "index of the item vectors, for faiss",
    "user_encoder.onnx": "histories to user vectors, for any ONNX runtime",
    "dataset": "manifest with statistics, and catalog",
    "tokenizer": "tokenizer of the language model or text encoder",
}


def model_card(
    saved: SavedRun,
    model: BaseModel | None,
    results: Sequence[Result],
    versions: Mapping[str, str],
    width: int,
    options: ExportOptions,
    files: Sequence[str],
) -> str:
    """The text of the card.

    Args:
        versions: the commit and libraries that export, by name.
        width: of the item vectors.
        files: paths of the export's other files.
    """
    config, manifest = saved.config, saved.manifest
    environment = Environment(undefined=StrictUndefined, trim_blocks=True)  # Markdown: nothing to escape
    tops = list(dict.fromkeys(Path(name).parts[0] for name in files))
    text = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"{config.system.name} on {manifest.name}",
        system=config.system.name,
        width=width,
        extensions=extensions(config.system),
        model=model,
        kind="text encoder" if model and model.key == "encoder" else "language model",
        examples=_example_titles(config.data.path),
        index=options.index,
        onnx=options.onnx,
        dataset=manifest,
        stats=manifest.statistics,
        split=_split(manifest),
        progress=saved.checkpoint.progress,
        train=config.train,
        seed=config.seed,
        sources=[f"`{key}/`" for key in built_on(config.system)],
        weights=saved.checkpoint.weights_sha256,
        config_hash=config_hash(config),
        versions=versions,
        columns=[_column(result) for result in results],
        rows=_rows(results),
        later=next((result.later_training for result in results if result.later_training), None),
        unseen="Histories may hold titles that it does not have."
        if reads_titles_alone(config.system)
        else "Histories may hold no others.",
        files=[(name, _FILES.get(name, "weights and settings of a run that it builds on")) for name in tops],
    )
    head = _head(saved, model, results, options).to_yaml()
    return f"---\n{head}\n---\n\n{text.rstrip()}\n"


def _head(saved: SavedRun, model: BaseModel | None, results: Sequence[Result], options: ExportOptions) -> ModelCardData:
    system = saved.config.system.name
    data: dict[str, Any] = {"license": options.license} if options.license else {}
    if model is not None and may_be_hub_id(model.path):
        data["base_model"] = model.path
    if results:  # the hub wants a name with results, and no results without
        data |= {"model_name": f"{system} on {saved.manifest.name}", "eval_results": _eval_results(saved, results)}
    tags = ["recommender-system", "sequential-recommendation", system.replace("_", "-"), "safetensors"]
    return ModelCardData(library_name="llm-srec-trainer", tags=tags, **data)


def _eval_results(saved: SavedRun, results: Sequence[Result]) -> list[EvalResult]:
    """Results for original histories; each metric says how its candidates were chosen."""
    return [
        EvalResult(
            task_type="sequential-recommendation",
            task_name="Sequential recommendation",
            dataset_type=saved.manifest.name.lower(),
            dataset_name=saved.manifest.name,
            dataset_split="test",
            dataset_revision=saved.manifest.fingerprint,
            metric_type=name.lower().replace("@", "_at_"),
            metric_name=f"{name} ({_column(result)})",
            metric_value=round(result.metrics[name].value, 4),
        )
        for result in results
        if result.history == "original"
        for name in _HEAD
        if name in result.metrics
    ]


def _column(result: Result) -> str:
    among = {"sampled": "sampled", "full": "unseen items", "full_with_seen": "all items"}[result.candidates]
    count = f" {result.num_candidates:,}" if result.num_candidates else ""
    return f"{result.history} histories, {among}{count}"


def _rows(results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    found = [name for name in _SHOWN if any(name in result.metrics for result in results)]
    return [(name, [_cell(result, name) for result in results]) for name in found]


def _cell(result: Result, name: str) -> str:
    if (estimate := result.metrics.get(name)) is None:
        return ""
    return f"{estimate.value:.4f} ({estimate.low:.4f} to {estimate.high:.4f})"


def _example_titles(data: Path) -> list[str]:
    """Two titles for the examples; the second may repeat the first."""
    titles = pl.read_parquet(data / CATALOG_NAME, columns=["title"], n_rows=2)["title"].to_list()
    return [titles[0], titles[-1]]


def _split(manifest: Manifest) -> str:
    """How the test was held out."""
    if not manifest.is_temporal:
        return "Each user's last two items are held out, for validation and for the test."
    text = "The test begins at a point in time for all users."
    if manifest.successive_after is not None:
        text += " Every later item is a target, and a user's metrics are the means over its targets."
    if left_out := manifest.num_users - manifest.num_train_users:
        text += f" {left_out:,} users are left out of training, for validation."
    return text
