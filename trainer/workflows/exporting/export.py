"""Write an export (`trainer/runs/exported.py` has its files).

Letters: N items of the catalog, D width of the vectors.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shards.manifest import CATALOG_NAME, MANIFEST_NAME, file_sha256
from trainer.config import RunConfig
from trainer.config.load import dump_config
from trainer.config.schema import built_on
from trainer.data.raw.items import RawItems
from trainer.distributed import alone
from trainer.reports.results import RESULTS_FILE, Result, latest, read
from trainer.runs import exported
from trainer.runs.atomic import atomic_folder
from trainer.runs.commit import git_commit, software
from trainer.runs.exported import BaseModel, ExportFacts, base_model_key, facts_json, inside
from trainer.runs.folder import EXPORTED, FILES, STATE, WEIGHTS, Checkpoint, RunFolder, files_json, state_json
from trainer.runs.preflight import SavedRun
from trainer.workflows.exporting.card import model_card
from trainer.workflows.exporting.checks import ExportOptions, check_export
from trainer.workflows.load_run import base_model_fingerprint, load_run
from trainer.workflows.recommending.asking import latest_time

__all__ = ["ExportOptions", "export"]

log = logging.getLogger(__name__)

_HERE = Path(".")


def export(saved: SavedRun, out: Path, options: ExportOptions | None = None) -> None:
    """Write a run to one folder that stands alone; it appears under its name once it is complete.

    The item vectors are those of the run folder, and are computed where it has none.

    Raises:
        ValueError: the run cannot be exported, or its language model is not the one that it was trained with.
        OSError: the folder cannot be written.
    """
    options = options or ExportOptions()
    check_export(saved, out, options)
    run = load_run(saved, alone(saved.config.engine.threads), exact=False)
    item_ND: npt.NDArray[np.float32] = run.item_vectors.cpu().numpy()
    results = _test_results(saved)
    with atomic_folder(out) as beside:
        _write_weights(saved.config, saved.checkpoint, beside, data=Path(exported.DATASET))
        for key, path in built_on(saved.config.system).items():
            source = RunFolder(path)
            _write_weights(source.config(), source.best(), beside / key, data=Path("..") / exported.DATASET)
        _write_items(RawItems.read(saved.config.data.path, saved.manifest.num_items), item_ND, beside)
        (beside / exported.DATASET).mkdir()
        for name in (MANIFEST_NAME, CATALOG_NAME):
            shutil.copyfile(saved.config.data.path / name, beside / exported.DATASET / name)
        _write_tokenizer(saved.config, beside / exported.TOKENIZER)
        (beside / exported.METRICS).write_text(json.dumps([_metrics(result) for result in results], indent=1))
        if options.index is not None:
            from trainer.workflows.exporting.index import write_index  # an extra

            write_index(item_ND, options.index, beside / exported.INDEX)
        if options.onnx:
            from trainer.workflows.exporting.onnx_encoder import write_user_encoder  # an extra

            write_user_encoder(run, beside / exported.ENCODER)
        model = _base_model(saved.config)
        _write_facts(beside, model, latest_time(saved))
        versions = {"commit": git_commit(), **{k: v for k, v in software().items() if v and k != "trainer"}}
        card = model_card(saved, model, results, versions, item_ND.shape[1], options, sorted(_files(beside)))
        (beside / exported.CARD).write_text(card, encoding="utf-8")


def _write_weights(config: RunConfig, checkpoint: Checkpoint, folder: Path, *, data: Path) -> None:
    """A checkpoint without moments, and the configuration of its run."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(checkpoint.weights, folder / WEIGHTS)
    (folder / STATE).write_text(state_json(checkpoint.progress, checkpoint.identity))
    (folder / FILES).write_text(files_json({name: file_sha256(folder / name) for name in EXPORTED}))
    (folder / exported.CONFIG).write_text(dump_config(inside(config, _HERE, data)))


def _write_items(items: RawItems, item_ND: npt.NDArray[np.float32], folder: Path) -> None:
    """Items with their vectors, by raw id: row i of both files is item i + 1 of the catalog."""
    np.save(folder / exported.ITEM_VECTORS, item_ND)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(item_ND.reshape(-1)), item_ND.shape[1])
    table = pa.table({"item_id": list(items.ids), "title": list(items.titles), "vector": vectors})
    pq.write_table(table, folder / exported.ITEMS, compression="zstd")


def _write_tokenizer(config: RunConfig, folder: Path) -> None:
    key = base_model_key(config.system)
    if key is None:
        return
    from trainer.nn.pretrained import read_tokenizer  # transformers takes seconds to import

    path: str = getattr(config.system, key).path
    read_tokenizer(path, cure=f"restore the model of {config.output}").save_pretrained(folder)


def _base_model(config: RunConfig) -> BaseModel | None:
    key = base_model_key(config.system)
    if key is None:
        return None
    return BaseModel(key, getattr(config.system, key).path, base_model_fingerprint(config.system))


def _write_facts(folder: Path, model: BaseModel | None, time: int) -> None:
    """What loading reads; the files of a checkpoint have their sha256 in `files.json`."""
    parts = ("manifest.json", "catalog.parquet")
    names = [exported.CONFIG, exported.ITEM_VECTORS, *(f"{exported.DATASET}/{name}" for name in parts)]
    digests = {name: file_sha256(folder / name) for name in names}
    (folder / exported.FACTS).write_text(facts_json(ExportFacts(exported.FORMAT, model, time, digests)))


def _test_results(saved: SavedRun) -> list[Result]:
    """The newest test results of the exported checkpoint; none if the run was not tested."""
    file = saved.config.output / RESULTS_FILE
    found = latest(read(file)) if file.is_file() else []
    step = saved.checkpoint.progress.step
    kept = [result for result in found if result.split == "test" and result.step == step]
    if not kept:
        log.warning("%s has no test result of step %d: the model card has no metrics", saved.config.output, step)
    return kept


def _metrics(result: Result) -> Mapping[str, object]:
    """A result without what is known from the export's other files, and without the name of the run folder."""
    shown = asdict(result)
    for name in ("run", "seconds", "tokens", "peak_memory_bytes"):
        del shown[name]
    return shown


def _files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
