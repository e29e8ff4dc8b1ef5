"""What a run says of itself: console, metrics.jsonl, wandb, plots."""
