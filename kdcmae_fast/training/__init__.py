"""The pretraining engine: DeepSpeed steps, schedules, checkpoints, logs."""
