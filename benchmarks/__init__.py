"""What developers measure: each module is a command, run as `python -m benchmarks.NAME`. Not part of the wheel."""
