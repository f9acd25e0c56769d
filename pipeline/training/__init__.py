"""The training loop, and what it uses: batches, schedule, optimizer, checkpoints, processes, GPU lock."""
