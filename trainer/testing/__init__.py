"""The contracts of models, optimizers and objectives as checks, for `python -m trainer check` and for the tests."""
