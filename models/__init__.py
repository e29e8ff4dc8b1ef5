"""The zoo: every architecture meets the contract of `models/base.py` and knows nothing of the trainer."""
