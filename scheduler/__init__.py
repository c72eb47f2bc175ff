"""The scheduler: observe, decide, act. The only Ray driver and the only writer of active jobs."""
