"""What a run needs around its steps: checkpoints, signals, logs, and what several processes do together."""
