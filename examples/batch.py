"""Several prompts together, each with the text that it has alone: python examples/batch.py [CKPT]."""

import sys

import frspec_jax

ckpt = sys.argv[1] if len(sys.argv) > 1 else "checkpoints/smollm2"
model = frspec_jax.load(ckpt)

prompts = [
    "Name a colour.",
    [{"role": "system", "content": "You answer in French."}, {"role": "user", "content": "Name a bird."}],
]
together = model.generate(prompts, max_new_tokens=24)
for prompt, answer in zip(prompts, together, strict=True):
    alone = model.generate(prompt, max_new_tokens=24)
    print(f"{answer.text!r}: {'as alone' if answer.tokens == alone.tokens else 'NOT as alone'}")
