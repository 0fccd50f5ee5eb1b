"""Sums of partial results in a fixed order, so that they do not depend on the number of threads."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from .vector import LANES, VECTOR_BYTES, as_pointer, fetch_add, load, load_float, store, store_float

ITEM = np.dtype([("source", np.int64), ("target", np.int64), ("parts", np.int64), ("size", np.int64)])
CALL = np.dtype([("counters", np.int64), ("tasks", np.int64), ("items", np.int64), ("item_count", np.int64)])

CHUNK = 1 << 14
"""Elements that one task sums."""


@njit
def _sum_range(item, first, last):
    part_bytes = 4 * item.size
    place = 4 * first
    while place + VECTOR_BYTES <= 4 * last:
        total = load(item.source + place)
        for part in range(1, item.parts):
            total = total + load(item.source + part * part_bytes + place)
        store(item.target + place, total)
        place += 4 * LANES
    while place < 4 * last:
        total = load_float(item.source + place)
        for part in range(1, item.parts):
            total = total + load_float(item.source + part * part_bytes + place)
        store_float(item.target + place, total)
        place += 4


def sum_partials(pointer):
    """Add up ``parts`` arrays of ``size`` float32 that follow each other, for every item of the call."""
    call = carray(pointer, 1, CALL)[0]
    items = carray(as_pointer(call.items), call.item_count, ITEM)
    task = fetch_add(call.counters)
    while task < call.tasks:
        skipped = task
        for i in range(call.item_count):
            chunks = (items[i].size + CHUNK - 1) // CHUNK
            if 0 <= skipped < chunks:
                _sum_range(items[i], skipped * CHUNK, min(items[i].size, (skipped + 1) * CHUNK))
            skipped -= chunks
        task = fetch_add(call.counters)
