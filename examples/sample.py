"""The same seed gives the same text, whatever drafts: python examples/sample.py [CKPT].

Speculative sampling usually promises the same distribution. Here it is the same text, so that "nothing was lost" is
something that you can see.
"""

import sys

import frspec_jax

ckpt = sys.argv[1] if len(sys.argv) > 1 else "checkpoints/smollm2"
drafting = frspec_jax.load(ckpt)
plain = frspec_jax.load(ckpt, "none", target=drafting.weights.target)  # the same weights, no draft

for seed in (1, 2):
    asked = {"temperature": 0.8, "top_p": 0.95, "seed": seed, "max_new_tokens": 24}
    fast, slow = (model.generate("Write a haiku about rain.", **asked) for model in (drafting, plain))
    same = "the same tokens" if fast.tokens == slow.tokens else "ANOTHER TEXT"
    print(f"seed {seed}: {fast.text!r}")
    print(f"        without a draft: {same}, {slow.rounds} rounds instead of {fast.rounds}\n")
