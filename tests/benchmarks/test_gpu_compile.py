"""The launch ledger: what it reads off a program, and, where `jax[cuda12]` is, that every budget is kept."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from benchmarks.gpu_compile import __main__ as command
from benchmarks.gpu_compile import hlo, ledger
from benchmarks.gpu_compile.hlo import Program
from frspec_jax.errors import UserError
from tests.conftest import ROOT

# A loop of rounds: a product, a kernel that updates a cache in place, a fusion that reads two rows of a table and one
# that updates a cache, a copy, a loop of known length and one of unknown length, and a conditional.
TEXT = """
HloModule jit_f, is_scheduled=true

%rows (p: bf16[100,64], i: s32[2]) -> bf16[2,64] {
  %p = bf16[100,64]{1,0} parameter(0)
  %i = s32[2]{0} parameter(1)
  ROOT %gather = bf16[2,64]{1,0} gather(%p, %i), offset_dims={1}
}

%update (c: bf16[8,256,64], r: bf16[8,2,64], s: s32[]) -> bf16[8,256,64] {
  %c = bf16[8,256,64]{2,1,0} parameter(0)
  %r = bf16[8,2,64]{2,1,0} parameter(1)
  %s = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %dus = bf16[8,256,64]{2,1,0} dynamic-update-slice(%c, %r, %zero, %s, /*index=4*/%zero)
}

%step (q: (s32[])) -> (s32[]) {
  %q = (s32[]) parameter(0)
  %n = s32[] get-tuple-element(%q), index=0
  %more = s32[] add(%n, %n)
  %again = s32[] multiply(%more, %n)
  ROOT %t = (s32[]) tuple(%again)
}

%test (q: (s32[])) -> pred[] {
  %q = (s32[]) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%few (x: s32[]) -> s32[] {
  ROOT %x = s32[] parameter(0)
}

%many (x: s32[]) -> s32[] {
  %x = s32[] parameter(0)
  %a = s32[] negate(%x)
  ROOT %b = s32[] add(%a, %x)
}

%round (s: (bf16[100,64], bf16[8,256,64], s32[])) -> (bf16[100,64], bf16[8,256,64], s32[]) {
  %s = (bf16[100,64]{1,0}, bf16[8,256,64]{2,1,0}, s32[]) parameter(0)
  %w = bf16[100,64]{1,0} get-tuple-element(%s), index=0
  %cache = bf16[8,256,64]{2,1,0} get-tuple-element(%s), index=1
  %n = s32[] get-tuple-element(%s), index=2
  %ids = s32[2]{0} broadcast(%n), dimensions={}, metadata={op_name="jit(f)/while/body/draft/extend/ids"}
  %x = bf16[2,64]{1,0} fusion(%w, %ids), kind=kLoop, calls=%rows, metadata={op_name="jit(f)/while/body/verify/gather"}
  %y = (bf16[2,100]{1,0}, s8[1024]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", metadata={op_name="jit(f)/while/body/verify/layer_3/mlp/dot"}
  %k = (bf16[2,64]{1,0}, bf16[8,256,64]{2,1,0}) custom-call(%x, %cache), custom_call_target="__gpu$xla.gpu.triton", output_to_operand_aliasing={{1}: (1, {})}, metadata={op_name="jit(f)/while/body/verify/layer_3/attention/jit(rotary_append)/rotary_append/pallas_call"}, backend_config={name = "rotary_append"}
  %written = bf16[8,256,64]{2,1,0} get-tuple-element(%k), index=1
  %r = bf16[8,2,64]{2,1,0} broadcast(%n), dimensions={}
  %compacted = bf16[8,256,64]{2,1,0} fusion(%written, %r, %n), kind=kLoop, calls=%update, metadata={op_name="jit(f)/while/body/compact/dus"}
  %copied = bf16[8,256,64]{2,1,0} copy(%compacted)
  %start = (s32[]) tuple(%n)
  %known = (s32[]) while(%start), condition=%test, body=%step, backend_config={"known_trip_count":{"n":"3"}}
  %unknown = (s32[]) while(%known), condition=%test, body=%step, metadata={op_name="jit(f)/while/body/draft/draft_level_2/while"}
  %chosen = s32[] conditional(%n, %n, %n), branch_computations={%few, %many}, metadata={op_name="jit(f)/while/body/choose/cond"}
  ROOT %out = (bf16[100,64]{1,0}, bf16[8,256,64]{2,1,0}, s32[]) tuple(%w, %copied, %chosen)
}

ENTRY %main (w: bf16[100,64], c: bf16[8,256,64], n: s32[]) -> (bf16[100,64], bf16[8,256,64], s32[]) {
  %w = bf16[100,64]{1,0} parameter(0)
  %c = bf16[8,256,64]{2,1,0} parameter(1)
  %n = s32[] parameter(2)
  %s = (bf16[100,64]{1,0}, bf16[8,256,64]{2,1,0}, s32[]) tuple(%w, %c, %n)
  ROOT %loop = (bf16[100,64]{1,0}, bf16[8,256,64]{2,1,0}, s32[]) while(%s), condition=%test, body=%round
}
"""  # noqa: E501
ROW, TABLE = 64 * 2, 100 * 64 * 2  # bytes


def test_a_program_is_read_by_launches_bytes_and_loops():
    program = Program(TEXT)
    assert program.decode_loops() == ["round"]
    block = program.block("round")
    assert [launch.what for launch in block.launches] == [
        "broadcast",
        "fusion",
        "product",
        "kernel rotary_append",
        "broadcast",
        "fusion",
        "copy",
    ]
    gather, product, kernel, _, update, copy = block.launches[1:]
    assert (gather.read, gather.written) == (2 * ROW + 8, 2 * ROW)
    assert product.read == 2 * ROW + TABLE
    assert (kernel.read, kernel.written) == (2 * ROW, 2 * ROW)  # the cache is updated in place
    assert (update.read, update.written) == (8 * 2 * ROW + 4, 8 * 2 * ROW)
    assert copy.read == copy.written == 8 * 256 * ROW
    assert [(loop.kind, len(loop.inside), loop.waits) for loop in block.loops] == [
        ("while", 2, False),
        ("while", 2, True),
        ("conditional", 2, True),
    ]


def test_the_ledger_counts_by_stage():
    class done:
        text, temporaries, held, loop = TEXT, 100 * 2**20, 2**30, 0

    found = ledger.ledger(done, layers=1)  # type: ignore[arg-type]
    stages = {stage["stage"]: stage["launches"] for stage in found["stages"]}
    assert stages == {"extend": 1, "verify layers": 2, "compaction": 1, "verify: the rest": 1, "the rest": 2}
    assert (found["launches"], found["waits"], found["cache_copies"]) == (7, 2, 1)
    assert [loop["stage"] for loop in found["loops"]] == ["the rest", "draft level 2", "head and choice"]
    kernels = [{"kernel": "rotary_append", "spilled": 8}]
    in_loops = sum(loop["launches"] for loop in found["loops"])
    entry = {"name": "this", "kernels": kernels, **found}
    assert ledger.over_budget(entry, {"launches": 6, "waits": 1, "compaction": 0}) == [
        "this: 7 launches, 6 allowed",
        "this: 2 waits of the host inside a round, 1 allowed",
        "this: 3 loops inside a round, 0 allowed",
        f"this: {in_loops} launches in all of these loops, 0 allowed",
        "this: 1 launches of compaction, 0 allowed",
        "this: 1 copies of a cache, 0 allowed",
        "this: 100 MiB of temporaries, 64 allowed",
        "this: 8 bytes spilled, 0 allowed",
    ]


def test_a_kernel_in_mosaic_gpu_goes_by_its_scope():
    """Its text holds a whole program, with names and brackets of all kinds."""
    text = """
ENTRY %main (q: bf16[60,32,128]) -> bf16[60,32,128] {
  %q = bf16[60,32,128]{2,1,0} parameter(0)
  ROOT %mpmd_map.3 = bf16[60,32,128]{2,1,0} custom-call(%q), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/verify/layer_0/jit(tree_attention)/tree_attention/mpmd_map"}, backend_config={module = "ML\\EFname = \\22other\\22 ({[name = "}
}
"""  # noqa: E501
    program = Program(text)
    (launch,) = program.block(program.entry).launches
    assert launch.what == "kernel tree_attention" and ledger.stage_of(launch.path) == "verify layers"
    assert (launch.read, launch.written) == (60 * 32 * 128 * 2, 60 * 32 * 128 * 2)


def test_what_crosses_devices_is_counted():
    text = """
ENTRY %main (x: bf16[60,8192], n: f32[60]) -> (bf16[60,8192], f32[8,60]) {
  %x = bf16[60,8192]{1,0} parameter(0)
  %n = f32[60]{0} parameter(1)
  %begun = bf16[60,8192]{1,0} all-reduce-start(%x), metadata={op_name="jit(f)/verify/layer_0/attention/psum"}
  %sum = bf16[60,8192]{1,0} all-reduce-done(%begun), metadata={op_name="jit(f)/verify/layer_0/attention/psum"}
  %all = f32[8,60]{1,0} all-gather(%n), dimensions={0}, metadata={op_name="jit(f)/verify/lm_head/all_gather"}
  ROOT %t = (bf16[60,8192]{1,0}, f32[8,60]{1,0}) tuple(%sum, %all)
}
"""

    class done:
        temporaries, held, loop = 2**30, 2**31, None

    done.text = text  # type: ignore[attr-defined]
    entry = {"name": "this", "kernels": [], **ledger.ledger(done, layers=1)}  # type: ignore[arg-type]
    assert entry["launches"] == 2 and entry["collectives"] == [
        {"stage": "verify layers", "count": 1, "of": {"all-reduce": 1}, "bytes": 60 * 8192 * 2},
        {"stage": "head and choice", "count": 1, "of": {"all-gather": 1}, "bytes": 8 * 60 * 4},
    ]
    budget = {"launches": 2, "waits": 0, "temporaries": 2048, "collectives": 1, "device": 2.5}
    assert ledger.over_budget(entry, budget) == [
        "this: 2 collectives, 1 allowed",
        "this: 3.0 GiB a device, 2.5 allowed",
    ]


@pytest.mark.parametrize(("shape", "size"), [("f32[]", 4), ("(bf16[2,3]{1,0}, s32[5]{0})", 32), ("pred[7]", 7)])
def test_sizes(shape, size):
    assert hlo.size_of(shape) == size


def test_two_ledgers_side_by_side(tmp_path, capsys, monkeypatch):
    stage = {"stage": "extend", "launches": 5, "read": 10}
    old = {"name": "a round", "launches": 7, "read": 20, "stages": [stage]}
    new = {**old, "launches": 6, "stages": [{**stage, "launches": 4}]}
    for name, entry in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"programs": [entry]}))
    table = command.difference(*(command._ledger_at(tmp_path / f"{name}.json") for name in ("old", "new")))
    assert [list(column.cells) for column in table.columns][1:5] == [
        ["all", "extend"],
        ["7", "5"],
        ["6", "4"],
        ["-1", "-1"],
    ]
    for content in (None, "{", "[]", "{}"):
        file = tmp_path / f"bad-{content}.json"
        if content is not None:
            file.write_text(content)
        with pytest.raises(UserError, match="is no ledger"):
            command._ledger_at(file)


@pytest.mark.parametrize(
    "wrong",
    [["--kernels", "some"], ["--model", "gpt"], ["--layers", "-1"], ["--draft-vocab", "many"], ["--context", "0"]],
)
def test_what_is_not_there_is_refused(wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_compile", *wrong, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2 and wrong[0] in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--what", "train", "--slots", "8"], "--slots says nothing of --what train"),
        (["--what", "vanilla", "--draft-vocab", "full"], "--draft-vocab says nothing of --what vanilla"),
        (["--what", "batch", "--tensor-parallel", "2"], "--tensor-parallel says nothing of --what batch"),
        (["--tensor-parallel", "3"], "--tensor-parallel 3: the target's 32 heads"),
    ],
)
def test_a_flag_that_would_change_nothing_is_refused(wrong, said, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_compile", *wrong, "--out", str(tmp_path / "out")])
    with pytest.raises(UserError) as refused:
        command.main()
    assert said in refused.value.on_the_command_line and not (tmp_path / "out").exists()


HAS_CUDA = importlib.util.find_spec("jax_cuda12_plugin") is not None


@pytest.mark.skipif(HAS_CUDA, reason="needs an environment without jax[cuda12]")
def test_without_the_wheels_it_says_what_to_do(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_compile", "--layers", "1", "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and "`make gpu-compile`" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.cuda_compile
@pytest.mark.skipif(not HAS_CUDA, reason="needs jax[cuda12]: `make gpu-compile`")
def test_every_budget_is_kept():
    wanted = json.loads(command.BUDGETS.read_text())["budgets"]
    entries = command.compile_all(wanted, {})
    assert [sentence for entry in entries for sentence in entry["over_budget"]] == []
