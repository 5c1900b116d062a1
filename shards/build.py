"""Builds a dataset folder from reviews; the folder appears under its name only when it is complete."""

import contextlib
import dataclasses
import logging
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from shards.accounting import loss_warnings, summary
from shards.formats.textfiles import check_readable
from shards.manifest import (
    SCHEMA,
    DatasetError,
    Manifest,
    Scalar,
    Stage,
    Statistics,
    write_manifest,
)
from shards.partitions.clean import check_times, cleaned, only_items
from shards.partitions.engine import Engine, Read
from shards.partitions.local import LocalEngine, local_engine
from shards.partitions.spark import SparkEngine
from shards.partitions.split import AllSequences, build_sequences
from shards.partitions.temporal import TemporalSplit, check_temporal
from shards.readers.files import expand, expand_meta, meta_beside
from shards.readers.reviews import LEFT_OUT, note_on_names, read_events
from shards.readers.sampling import Sample
from shards.readers.sources import Columns, source_named
from shards.readers.titles import read_titles
from shards.sequences import Filters, Sequences, check_filters
from shards.statistics import measure
from shards.user_hashes import UserKey, open_key, write_key
from shards.writing.candidates import check_negatives, drawn_negatives
from shards.writing.catalog import Catalog, make_catalog, titled_items
from shards.writing.folder import appearing, check_out
from shards.writing.writer import Layout, plan_layout, write_candidates, write_catalog, write_shards, write_users

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger("shards")


@dataclass(frozen=True)
class BuildOptions:
    """All settings that decide the bytes of a dataset, besides the input files."""

    source: str
    reviews: tuple[Path, ...]
    name: str
    meta: tuple[Path, ...] = ()
    columns: Columns = field(default_factory=Columns)
    filters: Filters = field(default_factory=Filters)
    user_fraction: float = 1.0
    seed: int = 0
    users_per_record: int | None = None
    shards: int | None = None
    negatives: int = 99
    title_negatives: int = 19
    missing_title: str = "error"
    bad_times: str = "error"
    ties: str = "hash"
    missing_ids: str = "error"
    user_sample: Sample = "hash"
    titles: str = "clean"
    hash_users: Path | None = None
    """Key file of the hashes that stand for user ids; None: raw ids. Not recorded, but that there is one is."""

    temporal: TemporalSplit | None = None
    """Split at a point in time; None: leave the last events out."""

    def recorded(self) -> dict[str, Scalar]:
        """Options that the manifest records: no paths, so that equal input gives equal manifests.

        Those of a temporal split are added with its times (`TemporalSplit.recorded`).
        """
        # Options of later versions are left out at their defaults, so that existing datasets keep their fingerprints.
        later = {name: getattr(self, name) for name in ("ties", "missing_ids", "user_sample", "titles")}
        changed = {name: value for name, value in later.items() if value != getattr(BuildOptions, name)}
        if self.columns.time_unit == "order":  # the times are no dates
            changed["time_unit"] = "order"
        if self.hash_users is not None:
            changed["hash_users"] = True
        return changed | {
            "source": self.source,
            "min_user": self.filters.min_user,
            "min_item": self.filters.min_item,
            "min_train": self.filters.min_train,
            "iterate": self.filters.iterate,
            "user_fraction": self.user_fraction,
            "seed": self.seed,
            "missing_title": self.missing_title,
            "bad_times": self.bad_times,
        }


@dataclass(frozen=True)
class Dataset:
    """A dataset, complete and checked, before anything of it is written."""

    users: AllSequences
    catalog: Catalog
    statistics: Statistics
    layout: Layout
    cleaning: Mapping[str, int] = field(default_factory=dict)

    @property
    def sequences(self) -> Sequences:
        """All users at once."""
        return self.users.together()


def build(
    out: Path,
    options: BuildOptions,
    *,
    overwrite: bool = False,
    workers: int = 1,
    spark: "SparkSession | None" = None,
) -> Manifest:
    """Build the dataset folder `out`; on any error `out` is left untouched.

    Args:
        overwrite: replace a dataset that is at `out`.
        workers: most processes that share the work on large input. The bytes are the same for any number.
        spark: does the work instead (`shards.partitions.spark`), with the same bytes.

    Raises:
        DatasetError: bad options or input, or `out` cannot be replaced.
    """
    out = out.resolve()
    check_out(out, overwrite)
    key = open_key(options.hash_users, out) if options.hash_users else None
    options = with_files(options)
    _check_options(options)
    with appearing(out, overwrite) as folder:
        scratch = folder / ".parts"
        scratch.mkdir(mode=0o700)
        local = local_engine(scratch, workers, options.reviews)
        with local if spark is None else contextlib.nullcontext(SparkEngine(spark)) as engine:
            dataset = prepare(options, engine)
            if key is not None:
                key, dataset = _hashed(key, dataset)
            manifest = write_dataset(folder, dataset, options)
        if key is not None and options.hash_users is not None:  # before the dataset, which needs it, appears
            write_key(options.hash_users, key)
            log.info("user ids are hashed; keep the key that undoes it: %s", options.hash_users)
        shutil.rmtree(scratch)
    for line in summary(manifest):
        log.info(line)
    log.info("done: %s, fingerprint %s", out, manifest.fingerprint[:12])
    return manifest


def prepare(options: BuildOptions, engine: Engine | None = None) -> Dataset:
    """Read, filter, split and check everything.

    Args:
        engine: reads and holds the events, and has to be there while the dataset is used; None: this process, all in
            memory.

    Raises:
        DatasetError: bad options or input.
    """
    engine = engine or LocalEngine()
    options = with_files(options)
    _check_options(options)
    cleaning: Counter[str] = Counter()
    log.info("reading %d review file(s)", len(options.reviews))
    note_on_names(options.source, options.reviews, options.columns)
    parts, items = engine.partitioned(_reader(options), options.reviews, options.seed, cleaning, _order_option(options))
    if left_out := cleaning.pop(LEFT_OUT, 0):
        log.info("left out: %s events of users outside --user-fraction %s", f"{left_out:,}", options.user_fraction)
    if not len(items):
        raise DatasetError(
            f"no events in {', '.join(map(str, options.reviews))} with --user-fraction {options.user_fraction}: "
            "raise --user-fraction or give different files"
        )
    parts, found = cleaned(parts, items, options.seed)
    stages: tuple[Stage, ...] = (found.read.stage("read"), found.clean.stage("clean"))
    tally = found.clean
    _log_stage(stages[0])
    check_times(found, options.bad_times, options.columns.time_unit)
    log.info("dropped: %s repeated events, %s with bad times", f"{found.duplicates:,}", f"{found.bad_times:,}")
    _log_stage(stages[1])
    titles = None
    if options.missing_title == "drop":  # before the k-core filter, which must not count these events
        titles = _titles(options, items, cleaning)
        parts, tally = only_items(parts, titled_items(items, titles).to_numpy())
        stages += (tally.stage("titled"),)
        _log_stage(stages[-1])
    users, stages = build_sequences(parts, items, options.filters, options.seed, stages, options.temporal, tally)
    for stage in stages[-2:]:
        _log_stage(stage)
    for line in loss_warnings(stages):
        log.warning(line)
    if titles is None:
        titles = _titles(options, users.item_ids, cleaning)
    catalog = make_catalog(users.item_ids, titles, options.missing_title, has_meta=bool(options.meta))
    statistics = measure(
        users.parts,
        stages,
        items=users.num_items,
        duplicate_events=found.duplicates,
        bad_times=found.bad_times,
        missing_titles=catalog.missing_titles,
    )
    _log_targets(users, statistics, options)
    layout = plan_layout(statistics.users, options.shards, options.users_per_record)
    counts = {"--negatives": options.negatives, "--title-negatives": options.title_negatives}
    check_negatives(users.parts, users.num_items, counts)
    return Dataset(users, catalog, statistics, layout, cleaning)


def _hashed(key: UserKey, dataset: Dataset) -> tuple[UserKey, Dataset]:
    """The dataset with hashes in place of raw user ids, and the key that also undoes these."""
    raw_ids = dataset.users.parts.each(attrgetter("user_ids"))
    key = key.with_users([raw for part in raw_ids for raw in part.to_list()])
    hashed = partial(_with_hashes, key=UserKey(key.salt, {}))
    parts = dataset.users.parts.map(hashed, "hashing user ids", lambda _: None)
    users = dataclasses.replace(dataset.users, parts=parts)
    return key, dataclasses.replace(dataset, users=users)


def _with_hashes(part: Sequences, key: UserKey) -> tuple[Sequences, None]:
    hashes = pl.Series(key.hashed(part.user_ids.to_list()), dtype=pl.String)
    return dataclasses.replace(part, user_ids=hashes), None


def with_files(options: BuildOptions) -> BuildOptions:
    """The options with the files that folders and globs stand for; titles in a folder of reviews are found.

    Raises:
        DatasetError: an unknown source, or a folder without its files.
    """
    source = source_named(options.source)
    meta = options.meta or meta_beside(options.reviews, source)
    if meta and not options.meta:
        log.info("titles from %s", ", ".join(path.name for path in meta))
    reviews = expand(options.reviews, source.reviews, source.meta)
    return dataclasses.replace(options, reviews=reviews, meta=expand_meta(meta, source))


def _check_options(options: BuildOptions) -> None:
    if not 0 < options.user_fraction <= 1:
        raise DatasetError(f"--user-fraction {options.user_fraction}: give a number above 0 and at most 1")
    if not options.name.isprintable():
        raise DatasetError(f"the dataset's name {options.name!a} is not plain text: give another by --name")
    if not options.reviews:
        raise DatasetError("no review files: give --reviews")
    check_filters(options.filters)
    if options.temporal is not None:
        check_temporal(options.temporal)
    for path in (*options.reviews, *options.meta):
        check_readable(path)


def _reader(options: BuildOptions) -> Read:
    return partial(
        read_events,
        options.source,
        columns=options.columns,
        user_fraction=options.user_fraction,
        seed=options.seed,
        sample=options.user_sample,
        missing_ids=options.missing_ids,
        keep_rows=options.ties == "file",
    )


def _order_option(options: BuildOptions) -> str | None:
    """The option that depends on the order of all files, if there is one."""
    chosen = {
        f"--source {options.source}": options.source in ("amazon5core", "recbole"),
        "--ties file": options.ties == "file",
        "--time-unit order": options.columns.time_unit == "order",
        "--user-sample official": options.user_sample == "official" and options.user_fraction < 1,
    }
    return next((option for option, is_chosen in chosen.items() if is_chosen), None)


def _titles(options: BuildOptions, wanted: pl.Series, cleaning: Counter[str]) -> pl.DataFrame:
    log.info("reading titles of %s items", f"{len(wanted):,}")
    return read_titles(
        options.source,
        options.reviews,
        options.meta,
        options.columns,
        wanted,
        clean=options.titles == "clean",
        counts=cleaning,
    )


def _log_stage(stage: Stage) -> None:
    log.info(
        "%s: %s users, %s items, %s events",
        stage.name,
        *(f"{n:,}" for n in (stage.users, stage.items, stage.interactions)),
    )


def _log_targets(users: AllSequences, statistics: Statistics, options: BuildOptions) -> None:
    """Report a temporal split, and users whose held-out events are early."""
    if users.split_times is not None:
        day = np.datetime64(users.split_times.test, "ms").astype("datetime64[D]")
        held_out = [f"{number:,}" for number in (statistics.users_with_valid, statistics.users_with_test)]
        log.info("temporal split at %s: %s users with a validation target, %s with a test target", day, *held_out)
    if options.temporal is not None and options.temporal.target == "successive":
        log.info("successive targets: %s in the test", f"{users.later_events:,}")
    if early := sum(users.parts.each(attrgetter("users_out_of_order"))):
        log.info("note: %s users have a held-out event that is older than their training events", f"{early:,}")


def write_dataset(directory: Path, dataset: Dataset, options: BuildOptions) -> Manifest:
    """Write a dataset into an empty folder, the manifest last."""
    users = dataset.users
    log.info("writing %d shard(s)", len(dataset.layout.bounds) - 1)
    shards = write_shards(directory, users.parts, dataset.layout)
    files = [write_catalog(directory, dataset.catalog.frame), write_users(directory, users.parts)]
    log.info("drawing candidates")
    widths = {
        f"{task}-{split}": width
        for task, width in (("retrieval", options.negatives), ("title", options.title_negatives))
        for split in ("valid", "test")
    }
    draw = partial(drawn_negatives, num_items=users.num_items, widths=widths, seed=options.seed)
    blocks = users.parts.stream(draw, "candidates")
    files += write_candidates(directory, widths, dataset.statistics.users, blocks)
    recorded = options.recorded()
    if options.temporal is not None and users.split_times is not None:
        recorded |= options.temporal.recorded(users.split_times, users.later_events)
    manifest = Manifest(
        schema=SCHEMA,
        name=options.name,
        num_users=dataset.statistics.users,
        num_items=users.num_items,
        negatives=options.negatives,
        title_negatives=options.title_negatives,
        users_per_record=dataset.layout.users_per_record,
        shards=shards,
        files=tuple(files),
        statistics=dataset.statistics,
        build=recorded,
        cleaning={reason: number for reason, number in dataset.cleaning.items() if number},
    )
    write_manifest(directory, manifest)
    return manifest
