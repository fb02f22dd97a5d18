"""Inner products of many vectors with one, on the calling thread alone.

numpy's wheels carry OpenBLAS, which shares a product of more than 460,800 numbers (450 vectors of 1,024)
among threads. Those then wait for more work by spinning, for about 30 ms: a search of 3,000 vectors took half
a millisecond in place of one, and 31 ms of CPU time; one search after the other, a whole processor. A server
has other requests for its processors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agentic_flow.core.later import Later

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    np = Later("numpy")

ALONE_MAX = 400_000
"""Numbers of a matrix that OpenBLAS multiplies without other threads: below 460,800 of them.

Source: OpenBLAS 0.3.31, interface/gemv.c, and measured."""


def inner_products(vectors: NDArray[Any], vector: NDArray[Any]) -> NDArray[Any]:
    """Of each row of `vectors`, shape (n, dimension), with `vector`, shape (dimension,): shape (n,)."""
    if vectors.size <= ALONE_MAX:
        return vectors.dot(vector)
    rows = max(1, ALONE_MAX // vectors.shape[1])
    found = np.empty(len(vectors), np.result_type(vectors, vector))
    for start in range(0, len(vectors), rows):
        found[start : start + rows] = vectors[start : start + rows].dot(vector)
    return found
