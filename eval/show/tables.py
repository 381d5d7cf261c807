"""Tables in the paper's layout: tasks as columns, then the average; our rows beside the paper's of the same V' / V."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from eval.data.questions import TASKS
from eval.show.tallies import Run, Tally, acceptance_by_depth, speed_ups
from frspec_jax import drafters
from frspec_jax.method import Method

OURS = "ours"
NOTHING = "–"  # a task that was not asked


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with a title, a note on what is counted, and rows of text."""

    name: str  # of its .csv file
    title: str
    note: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        """The table as Markdown: words to the left, figures to the right; beside the paper's rows, ours in bold."""
        words = [all(not _is_figure(row[i]) for row in self.rows) for i in range(len(self.headings))]
        rule = ("---" if left else "---:" for left in words)
        # A draft or a run may be named with what parts the cells.
        mine = [any(cell.startswith(f"{OURS}: ") for cell in row) for row in self.rows]
        rows = (
            [f"**{cell}**" if ours and not all(mine) else cell for cell in row]
            for row, ours in zip(self.rows, mine, strict=True)
        )
        lines = ([cell.replace("|", r"\|") for cell in line] for line in (self.headings, rule, *rows))
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"### {self.title}\n\n{self.note}\n\n{body}\n"

    def csv(self) -> str:
        """The table as CSV."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.headings, *self.rows])
        return text.getvalue()


def _is_figure(cell: str) -> bool:
    return bool(re.match(r"[\d,.]+", cell))


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table over tasks, ours or the paper's, before it is text."""

    label: str
    model: str
    kind: str  # "vanilla", "peer", or a draft's kind, with "+fr" where its vocabulary is cropped, and "+copying"
    size: float  # V' / V; 1 where nothing is cropped
    corpus: str  # what V' was ranked on, where that is told apart
    values: Mapping[str, float]  # by task
    average: float
    percent: float | None = None  # of the full vocabulary's average, as the paper prints it

    @property
    def place(self) -> tuple[int, bool, int, bool, int]:
        """Where the row stands: peers, vanilla, then drafts from the full vocabulary down."""
        kinds = ["peer", "vanilla", *drafters.known()]
        method = Method.parse(self.kind)
        kind = method.kind or self.kind
        return (
            kinds.index(kind) if kind in kinds else len(kinds),
            method.copying,
            method.slots,
            method.cropped,
            share_of(self.size),
        )

    @property
    def base(self) -> str:
        """The kind of the same method with its full vocabulary."""
        return dataclasses.replace(Method.parse(self.kind), cropped=False, slots=0).name

    @property
    def family(self) -> str:
        """What that method is called."""
        return dataclasses.replace(Method.parse(self.kind), cropped=False).label(None)


def paper() -> dict[str, Any]:
    """The paper's tables: figures by kind, V' and corpus."""
    return json.loads(resources.files("eval").joinpath("data/paper.json").read_text("utf-8"))


def share_of(size: float) -> int:
    """V / V' as the nearest power of two: 64k is a half of Llama 3's 128,256 tokens, and of Qwen 2's 151,936."""
    return 2 ** round(-math.log2(size))


def thousands(size: int) -> str:
    """A vocabulary's size as the paper writes it, 32k for 32,768; another size in full."""
    return f"{size // 1024}k" if size % 1024 == 0 else f"{size:,}"


def paper_rows(measure: str, temperature: float) -> list[Row]:
    """The paper's rows of a measure: tables of that temperature, each method of a model once."""
    rows: dict[tuple[str, str], Row] = {}
    for table in paper()["tables"]:
        if (table["measure"], table["temperature"]) != (measure, temperature):
            continue
        for row in table["rows"]:
            kind, size, corpus = row["kind"], row["draft_vocab"], row["corpus"] or ""
            method = Method.parse(kind)
            label = method.title if method.kind else "Vanilla"
            if method.cropped:
                name = "" if method.kind == "eagle" else f"{method.title} "
                label = f"{name}+FR {thousands(size)}" + (f" ({corpus})" if corpus else "")
            rows.setdefault(  # vanilla stands in several tables with the same figures
                (label, table["model"]),
                Row(
                    label,
                    f"paper, Table {table['table']}: {table['model']}",
                    kind,
                    size / table["vocabulary"] if size else 1.0,
                    corpus,
                    row["values"],
                    row["average"],
                    row.get("percent"),
                ),
            )
    return list(rows.values())


def our_rows(run: Run, names: list[str], value: Callable[[Tally], float]) -> list[Row]:
    """A run's rows of a measure."""
    rows = []
    for name in names:
        facts = run.methods[name]
        values = {task: value(part) for task, part in run.tallies[name].items()}
        size = facts["draft_vocab"] / run.vocabulary if facts["draft_vocab"] else 1.0
        corpus = re.search(r"\((.+)\)", name)  # `side_by_side.methods` names the ranking so, where it was given
        average = float(np.mean([*values.values()]))
        rows.append(
            Row(name, f"{OURS}: {run.model}", facts["kind"], size, corpus[1] if corpus else "", values, average)
        )
    return rows


def curves(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows from the full vocabulary down, by model and corpus: what a line of a plot over V' joins."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: -row.size):
        if row.kind != row.base:
            name = " ".join(filter(None, (row.model, row.family, row.corpus and f"({row.corpus})")))
            full = [other for other in rows if (other.model, other.kind) == (row.model, row.base)]
            groups.setdefault(name, full).append(row)
    return groups


def _cells(row: Row, digits: int) -> list[str]:
    return [f"{row.values[task]:.{digits}f}" if task in row.values else NOTHING for task in TASKS]


def accepted_length(run: Run) -> Table:
    """Tables 1, 6 and 7: accepted length by V' and task, and the share of the full vocabulary's average."""
    rows = our_rows(run, run.drafting, lambda part: part.accepted_length)
    rows += paper_rows("accepted_length", run.manifest["--temperature"])
    full = {(row.model, row.kind): row.average for row in rows if row.kind == row.base}
    body = []
    for row in sorted(rows, key=lambda row: row.place):
        whole = full.get((row.model, row.base))
        percent = row.percent or (100 * row.average / whole if whole else None)
        share = NOTHING if percent is None else f"{percent:.1f}%"
        body.append((row.label, row.model, *_cells(row, 2), f"{row.average:.2f}", share))
    return Table(
        "accepted_length",
        "Accepted length (Tables 1, 6, 7)",
        "Tokens a round, pooled over the rounds of a task; the bonus token is counted. % is of the average with the "
        "full vocabulary. Averages are means over the tasks that were asked.",
        ("Configuration", "Model", *TASKS, "Average", "% of full"),
        body,
    )


def decoding_speed(run: Run) -> Table:
    """Tables 2, 3, 5 and 8: tokens/s by method and task, and the average's speed-up over vanilla."""
    rows = our_rows(run, list(run.methods), lambda part: part.decode_rate)
    rows += paper_rows("tokens_per_second", run.manifest["--temperature"])
    vanilla = {_of(row): row.average for row in rows if row.kind == "vanilla"}
    body = [
        (row.label, row.model, *_cells(row, 2), f"{row.average:.2f}", f"{row.average / vanilla[_of(row)]:.2f}×")
        for row in sorted(rows, key=lambda row: row.place)
    ]
    return Table(
        "decoding_speed",
        "Decoding speed, tokens/s (Tables 2, 3, 5, 8)",
        f"Tokens over seconds of decoding, prefill left out. Ours: {run.manifest['machine']}, {run.manifest['dtype']}; "
        "the paper's: its own CUDA engine on a GPU.",
        ("Method", "Model", *TASKS, "Average", "× vanilla"),
        body,
    )


def _of(row: Row) -> str:
    """Whose vanilla a row is held against: the paper's model, whatever the table's number."""
    return row.model.rpartition(": ")[2] if row.model.startswith("paper") else row.model


def speed_up(run: Run) -> Table:
    """Speed-up over vanilla with its bootstrap interval, by task."""
    body = []
    for name in run.methods:
        if name == "vanilla":
            continue
        found = speed_ups(run.tallies[name], run.tallies["vanilla"])
        body.append((name, *(str(found.get(task, NOTHING)) for task in (*TASKS, "Average"))))
    return Table(
        "speed_up",
        "Speed-up over vanilla decoding",
        "Ratio of decoding tokens/s; in brackets the 95 % interval of a bootstrap over the questions of each "
        "task, where there are several.",
        ("Method", *TASKS, "Average"),
        body,
    )


def with_prefill(run: Run) -> Table:
    """Tokens/s of whole answers, by task, and the spread over repeats."""
    body = []
    for row in our_rows(run, list(run.methods), lambda part: part.whole_rate):
        rates = run.rates_by_repeat(row.label)
        spread = f"{np.mean(rates):.2f} ± {np.std(rates, ddof=1):.2f}" if len(rates) > 1 else NOTHING
        body.append((row.label, *_cells(row, 2), f"{row.average:.2f}", spread))
    return Table(
        "with_prefill",
        "Tokens/s, prefill included",
        "Tokens over seconds of prefill and decoding. Last column: decoding tokens/s over all questions, mean and "
        "standard deviation over the repeats.",
        ("Method", *TASKS, "Average", "decoding, by repeat"),
        body,
    )


def coverage(run: Run) -> Table:
    """The share of emitted tokens inside each sub-vocabulary, by task."""
    rows = our_rows(run, run.drafting, lambda part: part.coverage)
    body: dict[tuple[str, ...], str] = {}  # by the figures: methods of one V' that gave the same text share a row
    for row in rows:
        cells = (f"{row.values[task]:.1%}" if task in row.values else NOTHING for task in TASKS)
        figures = (f"{run.methods[row.label]['draft_vocab']:,}", *cells, f"{row.average:.1%}")
        body.setdefault((row.corpus, *figures), row.label)
    return Table(
        "coverage",
        "Coverage of the emitted tokens",
        "The share of the tokens in the answers that the draft could have proposed at all. Methods of the same V' that "
        "gave the same answers share a row.",
        ("Method", "V'", *TASKS, "Average"),
        [(label, *figures) for (_, *figures), label in body.items()],
    )


def by_depth(run: Run) -> Table:
    """Acceptance at each depth of the tree, over all tasks."""
    found = {name: acceptance_by_depth(run.whole(name).histogram) for name in run.drafting}
    deepest = max(map(len, found.values()), default=0)
    body = [
        (name, *(f"{x:.1%}" for x in shares), *[NOTHING] * (deepest - len(shares))) for name, shares in found.items()
    ]
    return Table(
        "acceptance_by_depth",
        "Acceptance by depth",
        "Of the rounds that accepted every draft above it, the share that accepted one at this depth; all tasks.",
        ("Method", *(f"depth {depth}" for depth in range(1, deepest + 1))),
        body,
    )


def identity(run: Run, tie: float) -> Table:
    """How many answers are vanilla's, token for token."""
    body = []
    for name in run.methods:
        if name == "vanilla":
            continue
        whole = run.whole(name)
        same, near, different = whole.identity(tie)
        body.append((name, f"{whole.answers}", f"{same / whole.answers:.1%}", f"{same}", f"{near}", f"{different}"))
    return Table(
        "identity",
        "Answers identical to vanilla's",
        f"Near-ties: parted where the target's two best choices lay within {tie:g}, which rounding decides.",
        ("Method", "answers", "share identical", "identical", "parted at a near-tie", "different"),
        body,
    )


def every(run: Run, tie: float) -> list[Table]:
    """All tables of a run."""
    makers = (accepted_length, decoding_speed, speed_up, with_prefill, coverage, by_depth)
    return [*(make(run) for make in makers), identity(run, tie)]
