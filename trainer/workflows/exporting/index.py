"""Item vectors as an index for faiss, which needs nothing of this package to be read.

Letters: N items of the catalog, D width of the vectors.
"""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from trainer.workflows.exporting.checks import IndexKind

_NEIGHBOURS = 32
"""Links per item and layer of the graph; faiss' own examples use 32."""
_BUILD = 200
"""Items considered per link while the graph is built: faiss' default of 40 loses recall with inner products."""
_SEARCH = 128
"""Items that are considered per search; stored in the index, and may be raised there."""


def write_index(item_ND: npt.NDArray[np.float32], kind: IndexKind, path: Path) -> None:
    """Write an index of inner products, the systems' scores: result i is row i of `items.parquet`."""
    width = item_ND.shape[1]
    if kind == "exact":
        index: faiss.Index = faiss.IndexFlatIP(width)
    else:
        index = faiss.IndexHNSWFlat(width, _NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = _BUILD, _SEARCH
    index.add(np.ascontiguousarray(item_ND))
    faiss.write_index(index, str(path))
