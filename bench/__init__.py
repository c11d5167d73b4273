"""Speed and memory, each against something named."""
