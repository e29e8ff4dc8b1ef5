"""Tasks with right answers (HellaSwag, LAMBADA, BLiMP, ...): lm-eval asks, the run's own model answers.

scoring.py computes log-likelihoods on all ranks; harness.py makes of it a model for lm-eval; suite.py loads tasks and evaluates
them; formats.py reads local files; the YAML files in `local` and `hub` are the tasks that lm-eval does not bring.
"""
