"""The simulator's executor, which tests drive by its levers. It passes the same contract tests as the one on Ray."""

from scheduler.simulator.executor import Clock, FakeAttempt, FakeExecutor

__all__ = ["Clock", "FakeAttempt", "FakeExecutor"]
