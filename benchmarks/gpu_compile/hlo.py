"""What a compiled GPU program would launch, read off XLA's optimised HLO as text.

Every instruction of a computation that runs on the device is one launch, but for those that only rename memory. What
is counted is the program: how long a launch takes, and whether a library splits it in two, no text tells.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

# Instructions that name memory, or say in what order things happen: nothing runs for them.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"}
FREE |= {"partition-id", "replica-id", "add-dependency", "domain"}
ENDS = ("-done", "-update")  # of an operation whose beginning is counted
BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "token": 0,
}  # fmt: skip

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO text."""

    name: str
    type: str  # of what it gives: an array's, or a tuple's
    operation: str
    operands: tuple[str, ...]
    text: str  # the whole line
    root: bool

    @property
    def path(self) -> str:
        """The scopes in which the program wrote it: "jit(f)/while/body/draft/extend/..."."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found.group(1) if found else ""

    def attribute(self, name: str) -> str | None:
        """A computation that the line names, of a fusion, a loop or a branch."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
        return found.group(1) if found else None

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        if many := re.search(r"branch_computations=\{([^}]*)\}", self.text):
            return [name.strip().lstrip("%") for name in many.group(1).split(",")]
        return [name for key in ("true_computation", "false_computation") if (name := self.attribute(key))]


@dataclasses.dataclass(frozen=True)
class Launch:
    """One thing that the device is told to do."""

    what: str  # a product, a fusion, a kernel of ours by name, a copy, ...
    path: str
    shape: str  # of its result
    read: int  # bytes
    written: int


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop or a conditional that the host steers. It waits for the device each time, unless the count is known."""

    kind: str  # "while" or "conditional"
    path: str
    inside: tuple[Launch, ...]  # of an iteration, or of the branch that launches most
    waits: bool


@dataclasses.dataclass(frozen=True)
class Block:
    """What one computation launches."""

    launches: tuple[Launch, ...]
    loops: tuple[Loop, ...]


class Program:
    """The computations of an optimised module."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        here: list[Instruction] | None = None
        for line in text.splitlines():
            if head := _HEAD.match(line):
                here = self.computations.setdefault(head.group(2), [])
                self.entry = head.group(2) if head.group(1) else self.entry
            elif line.startswith("}"):
                here = None
            elif here is not None and (instruction := _instruction(line)):
                here.append(instruction)

    def decode_loops(self) -> list[str]:
        """The bodies of the loops of rounds, which the entry runs itself, or through a conditional in its only loop.

        XLA's attention has one for each number of rows that it may look at (`engine.decode_rounds`).
        """
        (outer,) = self._loops(self.entry)
        choices = [i for i in self.computations[outer] if i.operation == "conditional"]
        within = [body for choice in choices for branch in choice.branches for body in self._loops(branch)]
        return within or [outer]

    def _loops(self, name: str) -> list[str]:
        return [i.attribute("body") or "" for i in self.computations[name] if i.operation == "while"]

    def block(self, name: str) -> Block:
        """What the computation `name` launches each time that it runs, calls included."""
        launches: list[Launch] = []
        loops: list[Loop] = []
        named = {i.name: i for i in self.computations[name]}
        for instruction in self.computations[name]:
            operation = instruction.operation
            if operation in FREE or operation.endswith(ENDS):
                continue
            if operation == "call":
                inner = self.block(instruction.attribute("to_apply") or "")
                launches += inner.launches
                loops += inner.loops
            elif operation == "while":
                inner = self.block(instruction.attribute("body") or "")
                known = "known_trip_count" in instruction.text
                loops.append(Loop("while", instruction.path, inner.launches, not known))
                loops += inner.loops
            elif operation == "conditional":
                each = [self.block(branch) for branch in instruction.branches]
                most = max(each, key=lambda block: len(block.launches))
                loops.append(Loop("conditional", instruction.path, most.launches, True))
                loops += most.loops
            else:
                launches.append(self._launch(instruction, named))
        return Block(tuple(launches), tuple(loops))

    def _launch(self, instruction: Instruction, named: dict[str, Instruction]) -> Launch:
        read, written = self._traffic(instruction, named)
        return Launch(_what(instruction), instruction.path, instruction.type, read, written)

    def _traffic(self, instruction: Instruction, named: dict[str, Instruction]) -> tuple[int, int]:
        """Bytes read and written: of an array that is only looked up in places, those; of one updated in place, too."""
        operands = [named[name] for name in instruction.operands if name in named]
        called = instruction.attribute("calls")
        inside = self.computations.get(called or "", [])
        if instruction.operation != "fusion" or not inside:
            if instruction.operation == "dynamic-slice":
                return size_of(instruction.type), size_of(instruction.type)
            if instruction.operation == "dynamic-update-slice":
                return size_of(operands[1].type), size_of(operands[1].type)
            # What a kernel is handed to be updated in place it reads and writes in a few places: not counted.
            in_place = {int(at) for at in re.findall(r"\{\d*\}: \((\d+),", _aliasing(instruction.text))}
            kept = sum(size_of(operands[at].type) for at in in_place)
            return sum(size_of(o.type) for o in operands) - kept, size_of(instruction.type) - kept
        inner = {i.name: i for i in inside}
        users: dict[str, list[Instruction]] = {}
        for i in inside:
            for name in i.operands:
                users.setdefault(name, []).append(i)
        read = 0
        for parameter in (i for i in inside if i.operation == "parameter"):
            read += int(_read(parameter, users))
        return read, _written(next(i for i in inside if i.root), inner)


def _aliasing(text: str) -> str:
    """Which results of a custom call are operands of it, as it says: {{1}: (3, {}), ...}."""
    found = re.search(r"output_to_operand_aliasing=(\{.*?\)\})", text)
    return found.group(1) if found else ""


def _read(value: Instruction, users: dict[str, list[Instruction]]) -> float:
    """How much of `value` a fusion reads."""
    total: float = 0
    for user in users.get(value.name, []):
        if user.operation in ("dynamic-slice", "slice", "gather") and user.operands[0] == value.name:
            total += size_of(user.type)
        elif user.operation == "dynamic-update-slice" and user.operands[0] == value.name:
            continue
        elif user.operation in ("bitcast", "get-tuple-element"):
            total += _read(user, users)
        else:
            return size_of(value.type)
    return min(total, size_of(value.type))


def _written(root: Instruction, inner: dict[str, Instruction]) -> int:
    """How much a fusion writes, whose result is `root`."""
    if root.operation == "tuple":
        return sum(_written(inner[name], inner) for name in root.operands)
    if root.operation == "bitcast" and root.operands[0] in inner:
        return _written(inner[root.operands[0]], inner)
    if root.operation == "dynamic-update-slice":
        return size_of(inner[root.operands[1]].type)
    return size_of(root.type)


def size_of(type_: str) -> int:
    """Bytes of an array's type, or of all of a tuple's."""
    total = 0.0
    for kind, dimensions in _ARRAY.findall(type_):
        total += BYTES.get(kind, 0) * math.prod(int(d) for d in dimensions.split(",") if d)
    return int(total)


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    name, type_, operation, rest = found.groups()
    rest = re.sub(r"/\*.*?\*/", "", rest)  # XLA numbers long lists of operands
    return Instruction(name, type_, operation, tuple(_operands(rest)), line.strip(), line.lstrip().startswith("ROOT"))


def _operands(rest: str) -> Iterator[str]:
    """The names between the operation's parentheses."""
    depth, start = 1, 0
    for at, letter in enumerate(rest):
        depth += letter in "({[" and 1
        depth -= letter in ")}]" and 1
        if (letter == "," and depth == 1) or depth == 0:
            word = rest[start:at].split()
            if word:
                yield word[-1].lstrip("%")
            start = at + 1
        if depth == 0:
            return


def _what(instruction: Instruction) -> str:
    """A launch's kind, in a word that a reader knows."""
    if instruction.operation == "custom-call":
        target = re.search(r'custom_call_target="([^"]+)"', instruction.text)
        called = target.group(1) if target else "custom-call"
        if "mosaic" in called:  # whose text holds the kernel's program, and in it names of all kinds
            return f"kernel {instruction.path.rstrip('/').split('/')[-2]}"
        if "triton" in called:
            name = re.search(r'name = "(\w+)"|"name":"(\w+)"', instruction.text)
            last = instruction.path.rstrip("/").split("/")[-1]
            return f"kernel {next(filter(None, name.groups())) if name else last}"
        return {"__cublas$gemm": "product", "__cublas$lt$matmul": "product", "__gpu$TopK": "top-k"}.get(called, called)
    if instruction.operation == "fusion":
        deeper = re.search(r'"kind":"([^"]+)"', instruction.text)
        kind = deeper.group(1) if deeper else instruction.attribute("kind") or ""
        return "product" if "gemm" in kind else "fusion"
    return instruction.operation.removesuffix("-start")
