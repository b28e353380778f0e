"""What may go wrong around a run, done on purpose.

    python -m tests.faults --kills 200

runs everything and prints a table of what was tried and what was lost. `tests/test_faults.py` runs
a short form of each. Every run is a process of its own, forked from one that has imported
everything, so that it can be killed at any instant.
"""
