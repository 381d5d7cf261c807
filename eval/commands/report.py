"""`python -m eval report RUN...`: tables in the paper's layout, with the paper's figures beside, and plots.

OUT/report.md holds all of it; OUT/RUN/*.csv are the tables, OUT/*.png and *.svg the plots. A run
that is not finished is reported as far as it has come.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.commands.flags import add_out_argument
from eval.show import plots, tables
from eval.show.tallies import Run
from frspec_jax import files
from frspec_jax.errors import UserError
from frspec_jax.locks import folder_lock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that python -m eval run has written")
    add_out_argument(parser, "where to write (default: report/ in the first RUN)")
    parser.add_argument(
        "--tie",
        type=float,
        metavar="GAP",
        help="choices closer than this are a near-tie (default: 1e-3 in float32, 0.25 in bfloat16)",
    )


def run(args: argparse.Namespace) -> None:
    runs = [Run.read(folder) for folder in args.runs]
    names = [one.name for one in runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two runs are called {name}, and their tables would lie in one folder; rename one")
    out: Path = args.out or args.runs[0] / "report"
    with folder_lock(out, f"--out {out}"):
        report(runs, out, args.tie)
    print(f"{out / 'report.md'}: {len(runs)} run{'s' if len(runs) > 1 else ''}, tables and plots beside it")


def report(runs: Sequence[Run], out: Path, tie: float | None) -> None:
    """Write the pages, tables and plots of these runs into a folder.

    tie: choices closer than this are a near-tie; None: as it suits each run's numbers.
    """
    pages = ["# Evaluation\n", introduction()]
    drawn = plots.save(plots.accepted_by_vocabulary(runs), out, "accepted_length_by_vocabulary")
    pages.append(picture(drawn, "Accepted length against V' / V: our runs, and the paper's models (dashed)"))
    for one in runs:
        every = tables.every(one, one.tie if tie is None else tie)
        pages += [f"## {one.name}\n", conditions(one)]
        speed = plots.save(plots.tokens_per_second(one), out, f"{one.name}-tokens_per_second")
        depth = plots.save(plots.acceptance(one), out, f"{one.name}-acceptance_by_depth")
        pages += [picture(speed, "Tokens/s by method"), picture(depth, "Acceptance by depth of the draft tree")]
        pages += [table.markdown() for table in every]
        write(out, {f"{one.name}/{table.name}.csv": table.csv() for table in every})
    write(out, {"report.md": "\n".join(pages)})


def write(out: Path, texts: Mapping[str, str]) -> None:
    """Write text files below --out."""
    for name, text in texts.items():
        with files.writing(f"--out {out}", "name another folder"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
        files.write_text(out / name, text, f"--out {out}")


def introduction() -> str:
    """How to read the tables."""
    return (
        f"Rows called *paper* are from {tables.paper()['source']}; *ours* were measured here. Rows of the same share "
        "V' / V stand together: the paper's 64k, 32k, 16k and 8k of 128,256 tokens are a half, a quarter, an eighth "
        "and a sixteenth of the vocabulary.\n"
    )


def picture(name: str, text: str) -> str:
    """A plot, in Markdown; the SVG lies beside the PNG."""
    return f"![{text}]({name}.png)\n"


def conditions(one: Run) -> str:
    """What a run measured, on what."""
    told = one.manifest
    asked, tasks = told["questions"]["asked"], told["questions"]["tasks"]
    answered = len({line["question"] for line in one.lines})
    temperature = told["--temperature"]
    trees = {str(facts["tree"]): facts["tree"] for name, facts in one.methods.items() if name in one.drafting}
    shapes = "; ".join(f"{tree['size']} nodes, depth {tree['depth']}, top-k {tree['top_k']}" for tree in trees.values())
    lines = {
        "Model": f"{one.model}, vocabulary {one.vocabulary:,}, {told['dtype']}",
        "Machine": told["machine"],
        "Versions": ", ".join(f"{name} {version}" for name, version in told["versions"].items()),
        "Questions": f"{answered} of {asked} answered ({', '.join(f'{task} {count}' for task, count in tasks.items())})"
        + (f"; {told['questions']['too long']} too long for the context" if told["questions"]["too long"] else ""),
        "Answers": f"at most {told['--max-new-tokens']} tokens; "
        + ("greedy" if temperature == 0 else f"temperature {temperature:g}, seed {told['--seed']}")
        + f"; {told['--repeats']} repeat{'s' if told['--repeats'] > 1 else ''}",
        "Draft tree": shapes,
        "Rankings": "; ".join(
            f"{name}: {facts['tokens']:,} tokens of {', '.join(facts['corpora'])}"
            for name, facts in told["rankings"].items()
        ),
    }
    return "\n".join(f"- {name}: {text}" for name, text in lines.items() if text) + "\n"
