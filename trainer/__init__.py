"""The trainer: ``python -m trainer CONFIG``. Reads a config and local folders, writes local folders.

It runs the same from a shell, in a test and inside a rank: a JSON config in (``trainer.config``), JSON lines out on
standard output (``trainer.protocol``), everything else on standard error. A run from a shell::

    cat > train.json <<EOF
    {"kind": "train", "job_id": "try", "attempt": 1, "name": "My first adapter",
     "base_model": {"id": "me/base", "revision": "main", "source": {"kind": "folder", "location": "path/to/model"}},
     "dataset_path": "chats.jsonl", "work_dir": "out/work", "cache_dir": "out/cache", "output_dir": "out", "threads": 2,
     "hyperparameters": {"learningRate": 2e-4, "batchSize": 8, "numEpochs": 1, "loraRank": 16, "loraAlpha": 32,
                         "loraDropout": 0.1}}
    EOF
    python -m trainer train.json

Ctrl-C finishes the micro-batch, saves a checkpoint and ends; ``"resume_from": "out/checkpoints/a1-s12"`` goes on from
one. ``"kind": "verdict"`` with the same base model, dataset and folders examines the dataset instead.
"""
