"""Which conversations are held out for validation, and which stand in the file more than once. Torch-free."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from trainer.formats import Split

Array = np.ndarray[Any, Any]
UNLABELLED, TRAIN, VALIDATION = 0, 1, 2
_LABELS: dict[Split | None, int] = {None: UNLABELLED, "train": TRAIN, "validation": VALIDATION}


class Digests:
    """16-byte digests of things seen, by line, and how they were labelled: 25 bytes each."""

    def __init__(self) -> None:
        self._digests = bytearray()
        self._lines = array("q")
        self._labels = bytearray()

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, digest: bytes, line: int, label: Split | None = None) -> None:
        self._digests += digest
        self._lines.append(line)
        self._labels.append(_LABELS[label])

    @property
    def lines(self) -> Array:
        return np.array(self._lines, dtype=np.int64)

    @property
    def labels(self) -> Array:
        return np.array(self._labels, dtype=np.uint8)

    def repeats(self) -> Iterator[tuple[int, int]]:
        """(line, line of its first occurrence) of every repetition, by line."""
        lines = self.lines
        _, first, group = np.unique(self._keys(), return_index=True, return_inverse=True)
        origin = first[group]
        for index in np.flatnonzero(origin != np.arange(len(lines))):
            yield int(lines[index]), int(lines[origin[index]])

    def validation(self, fraction: float) -> Array:
        """For each, whether it is held out; equal contents are never on both sides.

        A label decides, ``validation`` over ``train``. The rest go by their digest: ``fraction`` of all contents. If
        that leaves a side empty while there are two contents to choose from, one is moved there.
        """
        keys, labels = self._keys(), self.labels
        _, group = np.unique(keys, return_inverse=True)
        label = np.zeros(group.max(initial=-1) + 1, dtype=np.uint8)
        np.maximum.at(label, group, labels)
        place = np.zeros(len(label), dtype=np.uint64)
        place[group] = np.frombuffer(self._digests, dtype=">u8")[::2]
        held = np.where(
            label == UNLABELLED, place < np.uint64(min(int(fraction * 2**64), 2**64 - 1)), label == VALIDATION
        )
        free = np.flatnonzero(label == UNLABELLED)
        if fraction > 0 and len(label) > 1 and len(free):
            if not held.any():
                held[free[np.argmin(place[free])]] = True
            elif held.all():
                held[free[np.argmax(place[free])]] = False
        return held[group]

    def _keys(self) -> Array:
        return np.frombuffer(self._digests, dtype=[("high", ">u8"), ("low", ">u8")])
