"""A seeded, deterministic simulator of the whole platform (``python -m scheduler.simulator``).

The scheduler, its ledger and the API's services are the real ones. Simulated is only the world around them: time, the
network, the cluster, MLflow, the object store, the faults of the database and what users ask for.
"""
