"""The simulator's MLflow. It passes the same contract tests as the real server (``tests/integration/scheduler``)."""

from scheduler.simulator.tracking import FakeRun, FakeTracking

__all__ = ["FakeRun", "FakeTracking"]
