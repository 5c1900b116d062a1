"""`python -m shards {build,demo,link,verify,stats,users}`. Errors are one line, with exit code 2."""

import argparse
import logging
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shards.manifest import DatasetError, one_line, read_manifest, verify

if TYPE_CHECKING:
    from shards.partitions.temporal import TemporalSplit
    from shards.readers.sources import Columns

# Listed here, because `--help` must not wait for polars; a test compares them with the readers'.
SOURCE_NAMES = [
    "amazon2023", "amazon5core", "amazon2018", "amazon2014", "movielens", "steam", "yelp", "recbole", "table",
]  # fmt: skip
DATASET_NAMES = ["scientific", "movies", "electronics", "cds"]
_MOST_WORKERS = 8
"""By default; each takes memory for a part of the users."""

TIME_UNITS = ["s", "ms", "us", "ns", "yyyymmdd", "order"]


def main(argv: Sequence[str] | None = None, prog: str = "python -m shards") -> int:
    """Run a command; returns its exit code: 0, 2 after an error, 130 if interrupted."""
    arguments = _parser(prog).parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    try:
        return int(arguments.run(arguments))
    except DatasetError as error:
        print(f"error: {_shortened(one_line(str(error)))}", file=sys.stderr)
    except OSError as error:
        where = error.filename or "output"
        said = one_line(f"{where}: {error.strerror or error}: check disk space and permissions")
        print(f"error: {_shortened(said)}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 2


def _shortened(line: str, most: int = 1500) -> str:
    """The line; a very long one loses its middle, because its end names the cure."""
    return line if len(line) <= most else f"{line[: most - 400]} ... {line[-400:]}"


def _run_build(arguments: argparse.Namespace) -> int:
    # Imported late, so that `verify` and `--help` need neither polars nor pyarrow.
    from shards.build import BuildOptions, build
    from shards.paper.datasets import against_table_10
    from shards.partitions.temporal import TemporalSplit
    from shards.partitions.worker import cores
    from shards.sequences import Filters

    if arguments.dataset is not None:
        _choose_paper_dataset(arguments)
    if arguments.source is None or not arguments.reviews:
        raise DatasetError("what to build from is not given: give --source and --reviews, or --dataset and --raw")
    filters = Filters(arguments.min_user, arguments.min_item, arguments.min_train, arguments.iterate)
    options = BuildOptions(
        source=arguments.source,
        reviews=tuple(arguments.reviews),
        name=arguments.name or _default_name(arguments.reviews[0]),
        meta=tuple(arguments.meta),
        columns=_columns(arguments),
        filters=filters,
        user_fraction=arguments.user_fraction,
        seed=arguments.seed,
        users_per_record=arguments.users_per_record,
        shards=arguments.shards,
        negatives=arguments.negatives,
        title_negatives=arguments.title_negatives,
        missing_title=arguments.missing_title,
        bad_times=arguments.bad_times,
        ties=arguments.ties,
        missing_ids=arguments.missing_ids,
        user_sample=arguments.user_sample,
        titles=arguments.titles,
        hash_users=arguments.hash_users,
        temporal=_temporal(arguments, TemporalSplit),
    )
    unused = "spark_master" if arguments.engine == "local" else "workers"
    if getattr(arguments, unused) is not None:
        raise DatasetError(f"--{unused.replace('_', '-')} is not for --engine {arguments.engine}: remove it")
    if arguments.engine == "spark":
        from shards.partitions.spark import spark_session

        with spark_session(arguments.spark_master) as spark:
            manifest = build(arguments.out, options, overwrite=arguments.overwrite, spark=spark)
    else:
        workers = min(cores(), _MOST_WORKERS) if arguments.workers is None else arguments.workers
        manifest = build(arguments.out, options, overwrite=arguments.overwrite, workers=workers)
    if arguments.dataset is not None:
        for line in against_table_10(manifest):
            logging.getLogger("shards").info(line)
    return 0


def _choose_paper_dataset(arguments: argparse.Namespace) -> None:
    """Set the files and options with which the paper's code builds one of its datasets."""
    from shards.paper.datasets import HUB, PAPER_DATASETS, raw_files

    if arguments.source or arguments.reviews or arguments.meta or arguments.raw is None:
        raise DatasetError(
            "--dataset needs --raw DIR, the folder of its files, and takes no --source, --reviews or --meta"
        )
    fixed = {
        "user_fraction": 1.0, "user_sample": "hash", "missing_title": "error", "bad_times": "error",
        "split": "leave-one-out",
    }  # fmt: skip
    if changed := [name for name, default in fixed.items() if getattr(arguments, name) != default]:
        option = "--" + changed[0].replace("_", "-")
        raise DatasetError(f"--dataset {arguments.dataset} sets {option} as the paper's code does: remove it")
    dataset = PAPER_DATASETS[arguments.dataset]
    place = (arguments.download_from or HUB) if arguments.download else None
    arguments.reviews, arguments.meta = raw_files(dataset, arguments.raw, download_from=place)
    arguments.source, arguments.name = "amazon5core", arguments.name or dataset.name
    arguments.user_fraction, arguments.user_sample = dataset.user_fraction, "official"
    arguments.missing_title, arguments.bad_times = "official", "drop"


def _temporal(arguments: argparse.Namespace, kind: "type[TemporalSplit]") -> "TemporalSplit | None":
    given = {name: getattr(arguments, name) for name in ("quantile", "target", "validation", "validation_users")}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.split == "temporal":
        if "validation_users" in given and arguments.validation != "by-user":
            raise DatasetError("--validation-users is for --validation by-user only: remove it, or validate by user")
        return kind(**given)
    if given:
        raise DatasetError(
            f"--{next(iter(given)).replace('_', '-')} is for --split temporal only: remove it, or add --split temporal"
        )
    return None


def _run_demo(arguments: argparse.Namespace) -> int:
    from shards.readers.demo import movielens_files

    inter, item = movielens_files()
    arguments.source, arguments.reviews, arguments.meta, arguments.dataset = "recbole", [inter], [item], None
    return _run_build(arguments)


def _run_verify(arguments: argparse.Namespace) -> int:
    manifest = read_manifest(arguments.directory)
    verify(arguments.directory, manifest)
    print(f"{arguments.directory}: all {len(manifest.files) + len(manifest.shards)} files are intact")
    return 0


def _run_link(arguments: argparse.Namespace) -> int:
    from shards.remote.linked import link_dataset

    manifest = link_dataset(arguments.address, arguments.directory, cache_bytes=int(arguments.cache_gb * 10**9))
    print(f"{arguments.directory}: {manifest.num_users:,} users, {len(manifest.shards)} shards at {arguments.address}")
    return 0


def _run_stats(arguments: argparse.Namespace) -> int:
    from shards.statistics import stats_json, stats_text

    manifest = read_manifest(arguments.directory)
    order = None
    if arguments.order:
        from shards.stored.order import order_facts

        order = order_facts(arguments.directory, manifest)
    print(stats_json(manifest, order) if arguments.json else stats_text(manifest, order))
    return 0


def _run_users(arguments: argparse.Namespace) -> int:
    from shards.user_hashes import look_up, read_key

    for hashed, raw_id in look_up(read_key(arguments.key), arguments.users):
        print(f"{hashed}\t{one_line(raw_id)}")
    return 0


def _columns(arguments: argparse.Namespace) -> "Columns":
    """The names and layouts that the options give."""
    from shards.formats.delimited import Layout
    from shards.readers.sources import Columns

    if arguments.no_header != bool(arguments.columns):
        raise DatasetError(
            "--no-header and --columns belong together: a file without a header needs the names of its columns, "
            "a file with one has them"
        )
    separator = arguments.separator and arguments.separator.replace("\\t", "\t")
    names, meta_names = (text and tuple(text.split(",")) for text in (arguments.columns, arguments.meta_columns))
    return Columns(
        user=arguments.user_column,
        item=arguments.item_column,
        time=arguments.time_column,
        title=arguments.title_column,
        meta_item=arguments.meta_id_column,
        time_unit=arguments.time_unit,
        layout=Layout(separator, names, arguments.encoding),
        meta_layout=Layout(None if meta_names is None else separator, meta_names, arguments.encoding),
    )


def _default_name(path: Path) -> str:
    """`Books.train.csv.gz` -> `Books`: the file name without suffixes and split words; of a glob, the folder's name."""
    if "*" in path.name:
        path = path.parent
    name = re.sub(r"(\.(train|valid|test|jsonl?|csv|tsv|inter|parquet|gz))+$", "", path.name)
    return name or path.name


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Build, link, verify and describe sharded datasets.")
    commands = parser.add_subparsers(required=True, metavar="{build,demo,link,verify,stats,users}")
    build = commands.add_parser("build", help="build a dataset folder from reviews")
    build.add_argument("out", type=Path, metavar="OUT")
    build.add_argument("--dataset", choices=DATASET_NAMES, help="a dataset of the paper, built as by its code")
    build.add_argument("--raw", type=Path, metavar="DIR", help="the folder with the files of --dataset")
    build.add_argument("--download", action="store_true", help="fetch the files that --raw lacks")
    build.add_argument("--download-from", metavar="URL", help="fetch them from a mirror instead of the hub")
    build.add_argument("--source", choices=SOURCE_NAMES)
    build.add_argument("--reviews", default=[], nargs="+", type=Path, metavar="PATH", help="files, folders or globs")
    build.add_argument("--meta", default=[], nargs="+", type=Path, metavar="PATH", help="files with the titles")
    _add_build_options(build)
    build.set_defaults(run=_run_build)
    demo = commands.add_parser("demo", help="build MovieLens-100k from the installed recbole wheel")
    demo.add_argument("out", type=Path, metavar="OUT")
    _add_build_options(demo)
    demo.set_defaults(run=_run_demo)
    check = commands.add_parser("verify", help="check the sha256 of every file")
    check.add_argument("directory", type=Path, metavar="DIR")
    check.set_defaults(run=_run_verify)
    link = commands.add_parser("link", help="use a dataset whose shards stay at an address")
    link.add_argument("address", metavar="ADDRESS", help="folder of the dataset: https://..., s3://..., file://...")
    link.add_argument("directory", type=Path, metavar="DIR", help="a new folder for all other files")
    link.add_argument("--cache-gb", type=float, default=20.0, help="most gigabytes of shards kept here (default 20)")
    link.set_defaults(run=_run_link)
    stats = commands.add_parser("stats", help="print statistics, beside the paper's Table 10")
    stats.add_argument("directory", type=Path, metavar="DIR")
    stats.add_argument(
        "--order", action="store_true", help="also read all histories and measure whether order can matter in them"
    )
    stats.add_argument("--json", action="store_true")
    stats.set_defaults(run=_run_stats)
    users = commands.add_parser("users", help="undo --hash-users: print hash and raw id of users")
    users.add_argument("key", type=Path, metavar="KEY", help="the file of --hash-users")
    users.add_argument("users", nargs="+", metavar="USER", help="hashes or raw ids")
    users.set_defaults(run=_run_users)
    return parser


def _add_build_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--name", help="the dataset's name (default: from the first review file)")
    add("--overwrite", action="store_true", help="replace the dataset at OUT")
    add("--seed", type=int, default=0)
    add("--user-fraction", type=float, default=1.0, help="keep this fraction of users, by seeded hash")
    add("--min-user", type=int, default=5, help="minimum interactions per user (default 5)")
    add("--min-item", type=int, default=5, help="minimum interactions per item (default 5)")
    add("--min-train", type=int, default=5, help="minimum training items per user after filtering (default 5)")
    passes = parser.add_mutually_exclusive_group()
    passes.add_argument(
        "--single-pass", dest="iterate", action="store_false", help="filter once (default, as in the paper)"
    )
    passes.add_argument("--iterate", action="store_true", help="filter until nothing changes")
    parser.set_defaults(iterate=False)
    add(
        "--split",
        choices=["leave-one-out", "temporal"],
        default="leave-one-out",
        help="hold out each user's last two events (default), or all events after a point in time",
    )
    add("--quantile", type=float, help="temporal: share of events before the point in time (default 0.9)")
    add(
        "--target",
        choices=["last", "first", "random", "successive"],
        help="temporal: which later event is the target (default last); successive: in the test, each of them in turn",
    )
    add(
        "--validation",
        choices=["by-time", "by-user", "last-train-item"],
        help="temporal: validate after an earlier point in time (default), on the last event before the split of users "
        "who are left out of training, or on that of all users",
    )
    add("--validation-users", type=int, help="by-user: how many users are left out of training (default 500)")
    add("--negatives", type=int, default=99, help="retrieval negatives per user (default 99)")
    add("--title-negatives", type=int, default=19, help="title generation negatives per user (default 19)")
    add("--missing-title", choices=["error", "official", "drop"], default="error")
    add("--bad-times", choices=["error", "drop"], default="error")
    add("--shards", type=int, help="number of shards (default: at most 65,536 users each)")
    add("--users-per-record", type=int, help="users per tar member (default 1024)")
    add("--missing-ids", choices=["error", "drop"], default="error", help="rows without a user or item id")
    add("--ties", choices=["hash", "file"], default="hash", help="order of events at the same time (default hash)")
    add("--user-sample", choices=["hash", "official"], default="hash", help="how --user-fraction chooses users")
    add("--titles", choices=["clean", "raw"], default="clean", help="raw keeps HTML, scripts and 'nan' in titles")
    add(
        "--hash-users",
        type=Path,
        metavar="KEY",
        help="store salted hashes of user ids; KEY is the file to undo it with",
    )
    add(
        "--workers",
        type=int,
        metavar="N",
        help=f"most processes for large input (default: the cores of this job, at most {_MOST_WORKERS})",
    )
    add("--engine", choices=["local", "spark"], default="local", help="spark: build on a Spark cluster, the same bytes")
    add("--spark-master", metavar="URL", help="the cluster (default: of Spark's configuration, or this machine)")
    for column in ("user", "item", "time", "title"):
        add(f"--{column}-column", help=f"name of the {column} column (default: the source's)", metavar="NAME")
    add("--meta-id-column", help="name of the column of item ids beside the titles", metavar="NAME")
    add("--time-unit", choices=TIME_UNITS, help="unit of numeric times (default: the source's, or by their size)")
    add("--separator", help="separator of text tables (default: found in the first line)", metavar="TEXT")
    add("--encoding", default="utf-8", help="encoding of text tables (default utf-8)", metavar="NAME")
    add("--no-header", action="store_true", help="the review files have no header; name all columns with --columns")
    add("--columns", help="names of all columns of review files without a header, in order", metavar="NAME,NAME,...")
    add("--meta-columns", help="the same of metadata files without a header", metavar="NAME,NAME,...")


if __name__ == "__main__":
    # So that a cancelled Slurm job removes its unfinished folder, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
