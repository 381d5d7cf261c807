"""Rank tokens, let the target answer prompts, and train drafts on its answers."""
