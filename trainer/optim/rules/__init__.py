"""The rules beside AdamW, a family in each file. trainer/optim/__init__.py imports them all, which registers them."""
