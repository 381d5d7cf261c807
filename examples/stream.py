"""Text as it comes, and what the draft brought: python examples/stream.py [CKPT]."""

import sys

import frspec_jax

ckpt = sys.argv[1] if len(sys.argv) > 1 else "checkpoints/smollm2"
model = frspec_jax.load(ckpt)

stream = model.stream("Why is the sky blue?", max_new_tokens=64)
for piece in stream:  # about one a round, often several words
    print(piece, end="", flush=True)

answer = stream.result
print(f"\n\n{len(answer.tokens)} tokens in {answer.rounds} rounds of the large model")
print(answer.summary())
