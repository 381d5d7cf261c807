"""Bring models and drafts in from other formats: Hugging Face, GGUF, EAGLE."""
