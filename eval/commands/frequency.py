"""`python -m eval frequency RANKING...`: the long tail of token frequencies (the paper's Figure 2).

Each RANKING is a .npz file of python -m train rank, or a checkpoint folder that holds one; rankings of
several tokenizers or corpora may stand in one plot. Shares are of the occurrences that were counted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from eval.commands.flags import add_json_argument, add_out_argument
from eval.runs.provenance import save
from eval.show import plots
from frspec_jax import token_maps
from frspec_jax.commands import results_console
from frspec_jax.errors import UserError
from frspec_jax.vocabulary import Ranking

SHARES = (0.75, 0.90, 0.95, 0.99)  # of the occurrences


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rankings", nargs="+", type=Path, metavar="RANKING", help=".npz files, or checkpoint folders")
    add_out_argument(parser, "where the plot goes", required=True)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    rankings: dict[str, Ranking] = {}
    for path in args.rankings:
        name, file = named(path)
        if name in rankings:
            raise UserError(f"two rankings are called {name}; give files with names of their own")
        if token_maps.is_map(file):
            raise UserError(f"{file} is a token map, which has no counts; give a ranking of python -m train rank")
        rankings[name] = Ranking.load(file)
        if not rankings[name].tokens:
            raise UserError(f"{file} counts no token; count it again with python -m train rank")
    rows = [facts(name, ranking) for name, ranking in rankings.items()]
    plots.save(long_tail(rankings), args.out, "token_frequency")
    save(args.json, {"rankings": rows})
    show(rows)


def named(path: Path) -> tuple[str, Path]:
    """A ranking's name for people, and its file: CKPT/ranking.npz is called after its checkpoint."""
    file = path / "ranking.npz" if path.is_dir() else path
    return (file.resolve().parent.name if file.name == "ranking.npz" else file.stem), file


def cumulative(ranking: Ranking) -> np.ndarray:
    """The share of occurrences [V] that the 1, 2, ... V most frequent tokens make up."""
    return np.cumsum(np.sort(ranking.counts)[::-1]) / ranking.tokens


def needed(ranking: Ranking, share: float) -> int:
    """How many of the most frequent tokens make up at least a share of the occurrences."""
    return int(np.searchsorted(cumulative(ranking), share - 1e-12)) + 1


def facts(name: str, ranking: Ranking) -> dict[str, Any]:
    """What the paper says of Llama 3's tokenizer, for this ranking."""
    size = len(ranking.counts)
    quarter = float(cumulative(ranking)[max(1, size // 4) - 1])
    return {
        "name": name,
        "vocabulary": size,
        "tokens": ranking.tokens,
        "corpora": list(ranking.corpora),
        "never_seen": round(float((ranking.counts == 0).mean()), 4),
        "last_three_quarters": round(1 - quarter, 4),  # of the vocabulary: their share of the occurrences
        "share_of_vocabulary_for": {f"{share:.0%}": round(needed(ranking, share) / size, 4) for share in SHARES},
    }


def counted(name: str, ranking: Ranking) -> str:
    """A ranking in a picture's legend: whose tokens they are, and how many were counted."""
    return f"{name}: {ranking.tokens / 1e6:,.3g} million tokens, of {len(ranking.counts):,} ids"


def long_tail(rankings: dict[str, Ranking]) -> Figure:
    """Frequency by rank, both axes logarithmic; and the cumulative share of occurrences by share of vocabulary."""
    drawn, (zipf, whole) = plots.figure(width=10.5, columns=2)
    for number, (name, ranking) in enumerate(rankings.items()):
        colour = plots.COLOURS[number % len(plots.COLOURS)]
        counts = np.sort(ranking.counts)[::-1]
        seen = counts[counts > 0] / ranking.tokens
        ranks = np.unique(np.geomspace(1, len(seen), 400).astype(int))  # evenly over the logarithm: a light SVG
        zipf.plot(ranks, seen[ranks - 1], color=colour)
        share = cumulative(ranking)
        places = np.unique(np.linspace(1, len(share), 500).astype(int))
        whole.plot(places / len(share), share[places - 1], color=colour, label=plots.plain(counted(name, ranking)))
    whole.axvline(0.25, color="black", linewidth=1, linestyle=":")
    whole.axhline(0.95, color="black", linewidth=1, linestyle=":")
    whole.annotate(
        "the paper, Llama 3: 25 % of the vocabulary\nmake up more than 95 % of occurrences",
        (0.27, 0.93),
        va="top",
        fontsize="small",
    )
    zipf.set_xscale("log")
    zipf.set_yscale("log")
    zipf.set_xlabel("rank of the token")
    zipf.set_ylabel("share of occurrences")
    whole.set_xlabel("share of the vocabulary, most frequent first")
    whole.set_ylabel("cumulative share of occurrences")
    whole.set_ylim(0, 1.02)
    whole.legend(fontsize="small", loc="lower right")
    return drawn


def show(rows: list[dict[str, Any]]) -> None:
    """The shares as a table."""
    table = Table(title="share of the vocabulary that makes up a share of the occurrences")
    headings = ("ranking", "V", "tokens counted", *(f"{s:.0%}" for s in SHARES), "last 3/4 of V", "never seen")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "ranking" else "right")
    for row in rows:
        shares = (f"{value:.1%}" for value in row["share_of_vocabulary_for"].values())
        table.add_row(
            row["name"],
            f"{row['vocabulary']:,}",
            f"{row['tokens']:,}",
            *shares,
            f"{row['last_three_quarters']:.1%}",
            f"{row['never_seen']:.1%}",
        )
    results_console().print(table)
    print("last 3/4 of V: what the rarest three quarters make up; the paper: under 5% (Llama 3, SlimPajama)")
