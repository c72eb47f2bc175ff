"""The weakenings that ``python -m benchmarks.mutate`` tries, each with the tests that must notice it."""

from __future__ import annotations

from benchmarks.mutations.access import ACCESS
from benchmarks.mutations.money import MONEY
from benchmarks.mutations.mutation import Mutation
from benchmarks.mutations.scheduling import CHECKPOINTS, FENCES, STATE_MACHINE

MUTATIONS = (*FENCES, *STATE_MACHINE, *CHECKPOINTS, *MONEY, *ACCESS)

__all__ = ["MUTATIONS", "Mutation"]
