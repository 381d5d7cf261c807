"""What a smaller draft vocabulary costs, as a table and a plot: python examples/compare_vocabularies.py [CKPT].

The text is the same for each; only how much of it was guessed differs. Every round checks the same number of guesses
here (a fixed tree), as in the paper.
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import frspec_jax
from frspec_jax import Draft

ckpt = sys.argv[1] if len(sys.argv) > 1 else "checkpoints/smollm2"
questions = ("Why do leaves turn red in autumn?", "Write a Python function that reverses a list.")
target = None
sizes, lengths = [], []
for share in ("full", "1/4", "1/16"):
    model = frspec_jax.load(ckpt, Draft(vocab=share, pace="fixed"), target=target)
    target = model.weights.target  # read once, shared by all
    answers = [model.generate(question, max_new_tokens=32) for question in questions]
    tokens, rounds = sum(len(answer.tokens) - 1 for answer in answers), sum(answer.rounds for answer in answers)
    sizes.append(model.draft_vocab)
    lengths.append(tokens / max(1, rounds))
    print(f"V' = {sizes[-1]:>7,}: {lengths[-1]:.2f} tokens a round")

plt.figure(figsize=(5, 3), layout="constrained")
plt.bar([f"{size:,}" for size in sizes], lengths, color=["#9a9a9a", "#0072B2", "#0072B2"])
plt.axhline(1, color="black", linewidth=0.8)  # plain decoding
plt.xlabel("tokens that the draft may guess")
plt.ylabel("accepted length")
plt.savefig("vocabularies.png", dpi=120)
print("wrote vocabularies.png")
