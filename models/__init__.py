"""The models: each follows the contract of `models/base.py` and does not depend on the trainer."""
