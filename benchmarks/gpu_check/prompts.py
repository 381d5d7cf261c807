"""Prompts for the model to answer: users' first turns out of files, or what can be asked of what Python itself brings.

A draft learns what it is shown, so conversations of the kind that will be decoded are worth having. Without any, there
are the standard library's docstrings to explain and to sum up, everyday topics, and German sentences. No question set
is read.
"""

from __future__ import annotations

import ast
import itertools
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from train.corpus import Tally, corpus_files
from train.first_prompts import first_prompts

SHORTEST, LONGEST = 8, 1200  # characters
MOST = 60_000  # prompts: more than a GPU answers in the time
OF_TEXT = (
    "Explain this in simple words:\n\n{text}",
    "Sum up this passage in one or two sentences.\n\n{text}",
    "Write a Python function `{name}` that does this:\n\n{text}",
    "{text}\n\nWhat is meant by that? Give an example.",
)
OF_TOPIC = (
    "What is {}?",
    "Tell me three facts about {}.",
    "Write a short story about {}.",
    "Write a poem of four lines about {}.",
    "How would you explain {} to a child?",
    "What are the advantages and disadvantages of {}?",
    "Give me a list of ten words that have to do with {}.",
    "Write an email to a friend about {}.",
    "Who first thought about {}, and when?",
    "Why does {} matter today?",
)
TOPICS = [
    "bread",
    "bicycles",
    "rain",
    "the moon",
    "money",
    "chess",
    "volcanoes",
    "libraries",
    "honey",
    "trains",
    "gardens",
    "sleep",
    "music",
    "rivers",
    "glass",
    "electricity",
    "the stock market",
    "vaccines",
    "tea",
    "winter",
    "maps",
    "robots",
    "elections",
    "whales",
    "bridges",
    "dreams",
    "salt",
    "clocks",
    "forests",
    "cooking",
    "photography",
    "the internet",
    "mathematics",
    "dogs",
    "deserts",
    "paper",
    "football",
    "earthquakes",
    "cheese",
    "stars",
    "languages",
    "cars",
    "medicine",
    "mountains",
    "newspapers",
    "insects",
    "oil",
    "painting",
    "islands",
    "schools",
]
GERMAN = [
    "Guten Abend, ist hier noch frei?",
    "Morgen soll es regnen.",
    "Wo finde ich die Post?",
    "Das Buch liegt auf dem Tisch.",
    "Meine Schwester lernt seit zwei Jahren Klavier.",
    "Der Bus kommt heute später.",
    "Haben Sie noch ein Zimmer?",
    "Im Sommer fahren wir an die See.",
    "Die Stadt baut eine neue Brücke.",
    "Er vergisst immer seinen Schlüssel.",
]


def made(files: list[Path], seed: int = 0) -> list[str]:
    """Prompts in a mixed order, each once; those of files first, where there are any."""
    rng = random.Random(seed)
    given = [one.text for one in first_prompts(corpus_files(files), Tally()) if _fits(one.text)] if files else []
    own = [*_of_docstrings(rng), *(ask.format(topic) for ask, topic in itertools.product(OF_TOPIC, TOPICS))]
    own += [f"Translate German to English: {a} {b}" for a, b in itertools.permutations(GERMAN, 2)]
    rng.shuffle(given)
    rng.shuffle(own)
    chosen = list(dict.fromkeys([*given, *filter(_fits, own)]))[:MOST]
    rng.shuffle(chosen)
    return chosen


def _fits(text: str) -> bool:
    return SHORTEST <= len(text) <= LONGEST


def _of_docstrings(rng: random.Random) -> Iterator[str]:
    """Two prompts for each docstring of some length."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in file.parts or "test" in file.parts:
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # files that are there to be wrong
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = re.sub(r"[ \t]+", " ", ast.get_docstring(node) or "")
                if 60 <= len(text) <= 900:
                    yield from (ask.format(name=node.name, text=text) for ask in rng.sample(OF_TEXT, 2))
