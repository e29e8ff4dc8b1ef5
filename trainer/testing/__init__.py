"""The contract that models promise, as checks: behind `python -m trainer check` and in the tests."""
