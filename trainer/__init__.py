"""The trainer: ``python -m trainer CONFIG``. Reads a config and local folders, writes local folders."""
