"""The public benchmarks: their files, prompts and scoring rules."""
