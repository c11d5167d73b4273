"""Multimodal models in one transformer, without a vision encoder, from the parts of llama.py."""
