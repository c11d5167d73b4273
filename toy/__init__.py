"""The small world of `make demo`: pictures, stand-ins, report, ablations."""
