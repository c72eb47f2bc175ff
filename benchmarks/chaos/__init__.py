"""The rooms of ``benchmarks.faults``: installations, victims, faults, the probe, and what must hold afterwards."""
