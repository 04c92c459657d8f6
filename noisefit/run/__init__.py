"""A run's life: settings, output folder, checkpoints, metrics, evaluation, processes, signals, memory."""
