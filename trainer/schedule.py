"""What every step does, from (seed, step) alone: which conversations, which learning rate, which dropout."""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from trainer.config import Hyperparameters


class Schedule(NamedTuple):
    """Steps are counted from 0 where they are done, and by how many are done where something follows them."""

    train: np.ndarray[Any, Any]
    """Rows of the conversations to train on."""
    hyperparameters: Hyperparameters

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train) // self.hyperparameters.batch_size)

    @property
    def total_steps(self) -> int:
        total = self.hyperparameters.num_epochs * self.steps_per_epoch
        return min(self.hyperparameters.max_steps or total, total)

    def epoch(self, done: int) -> int:
        """The epoch, from 1, of the last of ``done`` steps; 0 before the first."""
        return -(-done // self.steps_per_epoch)

    def batch(self, step: int) -> np.ndarray[Any, Any]:
        """Rows of one step. Each epoch visits all conversations once, in an order of its own."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.hyperparameters.seed, epoch)).permutation(len(self.train))
        size = self.hyperparameters.batch_size
        return self.train[order[place * size : (place + 1) * size]]

    def learning_rate(self, step: int) -> float:
        """A linear warm-up, then the chosen decline."""
        h, total = self.hyperparameters, self.total_steps
        warmup = math.ceil(h.warmup_ratio * total)
        if step < warmup:
            return h.learning_rate * (step + 1) / warmup
        passed = (step - warmup) / max(1, total - warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * passed))
        return h.learning_rate * {"constant": 1.0, "linear": 1 - passed, "cosine": cosine}[h.lr_scheduler]

    def dropout_seed(self, step: int, micro_batch: int) -> int:
        text = f"{self.hyperparameters.seed}/{step}/{micro_batch}"
        return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big")

    def evaluates(self, done: int) -> bool:
        return self._due(done, self.hyperparameters.eval_steps)

    def saves(self, done: int) -> bool:
        return done > 0 and self._due(done, self.hyperparameters.checkpoint_steps)

    def _due(self, done: int, every: int) -> bool:
        """Every so many steps, or at each epoch's end (0); always at the start and at the end."""
        return done % (every or self.steps_per_epoch) == 0 or done == self.total_steps
