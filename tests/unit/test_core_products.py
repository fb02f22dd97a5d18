"""Inner products of many vectors with one."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from agentic_flow.core.products import ALONE_MAX, inner_products

DIMENSION = 1000
ROWS = ALONE_MAX // DIMENSION


@pytest.mark.parametrize("rows", [0, 1, ROWS, ROWS + 1, 2 * ROWS, 2 * ROWS + 1])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_they_are_those_of_numpy(rows: int, kind: type[np.floating]) -> None:
    """Catches a row that is left out or taken twice where one block ends, and another type of numbers."""
    rng = np.random.default_rng(rows)
    vectors: NDArray[np.floating] = rng.normal(size=(rows, DIMENSION)).astype(kind)
    vector = rng.normal(size=DIMENSION).astype(kind)
    found = inner_products(vectors, vector)
    assert (found.dtype, found.shape) == (vectors.dtype, (rows,))
    np.testing.assert_allclose(found, np.einsum("ij,j->i", vectors, vector), rtol=1e-3, atol=1e-4)


def test_a_vector_longer_than_a_block() -> None:
    """Catches a block of no rows."""
    vectors = np.ones((3, ALONE_MAX + 1), np.float32)
    np.testing.assert_allclose(inner_products(vectors, vectors[0]), [ALONE_MAX + 1] * 3, rtol=1e-3)


_PROGRAM = """
import time
import numpy as np
from agentic_flow.core.products import inner_products

def share_of_others():
    own, all_s = time.thread_time(), time.process_time()
    for _ in range(20):
        inner_products(vectors, vector)
    own, all_s = time.thread_time() - own, time.process_time() - all_s
    return (all_s - own) / own

vectors, vector = np.ones((20_000, 1_000), np.float32), np.ones(1_000, np.float32)
# The threads begin by spinning once, on a machine that has no time perhaps only now.
print(min(share_of_others() for _ in range(5)))
"""


def test_no_other_thread_takes_part() -> None:
    """Catches blocks that numpy's library shares among threads, which go on spinning long afterwards."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.05, "CPU time of other threads, as a share of this one's"
