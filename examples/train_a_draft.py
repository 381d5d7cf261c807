"""A draft of a checkpoint's own, from prompts to an answer: python examples/train_a_draft.py [CKPT [TOKENS [STEPS]]].

The model answers the prompts, a draft learns from the answers, a ranking is counted if there is none. TOKENS of answers
and STEPS of training are tiny here, so that it takes minutes; a useful draft takes some 1,000,000 and 2,000.
"""

import json
import sys
import time
from pathlib import Path

import frspec_jax
from frspec_jax.__main__ import main as frspec

ckpt, tokens, steps = (sys.argv[1:] + ["checkpoints/smollm2", "12000", "30"][len(sys.argv) - 1 :])[:3]
name = f"tiny-{int(time.time())}"

topics = ("rain", "bread", "the moon", "trees", "bees", "snow", "music", "rivers", "glass", "sleep", "salt", "birds")
forms = ("What is {}?", "Why do people like {}?", "Tell me a fact about {}.", "Write two sentences about {}.")
prompts = Path("prompts.jsonl")
prompts.write_text("".join(json.dumps({"prompt": form.format(topic)}) + "\n" for form in forms for topic in topics))

run = f"train eagle {prompts} --ckpt {ckpt} --name {name} --own-answers {tokens} --steps {steps}"
frspec([*run.split(), *["--warmup", "3", "--rows", "2", "--row", "128", "--accept-every", "0"]])
answer = frspec_jax.load(ckpt, name).generate("Why is the sky blue?", max_new_tokens=24)
print(f"{answer.text!r}\n{answer.summary()}")
