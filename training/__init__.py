"""What every trainer needs and no paper mentions: processes, checkpoints, the plan."""
