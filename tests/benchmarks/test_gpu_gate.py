"""The gate of the GPU kernels can say no, and the tables in the repository are what it made."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.gpu import hlo, sass
from benchmarks.gpu.cases import REFUSALS, gate_cases, refusals_of
from benchmarks.gpu.report import (
    CaseReport,
    KernelReport,
    as_json,
    faults,
    from_json,
    judge,
    kernel_report,
)
from benchmarks.gpu.roofline import COMPILED, LEVELS, SHAPES, page_bytes, roofline_page, step_bytes
from benchmarks.gpu.table import gate_page, merged, stale
from benchmarks.gpu.target import NAMES, load_target
from kvcompress_jax.paged import CacheLayout

DOCS = Path(__file__).parents[2] / "docs"

KERNEL = KernelReport(
    name="attention",
    registers=128,
    spilled_bytes=0,
    stack_bytes=0,
    shared_bytes=8192,
    warps=4,
    occupancy=0.25,
    load_bits={"128": 12, "32": 7},
    tensor_core_instructions=16,
    local_instructions=0,
    issue_ceilings=[1.4],
)
GOOD = CaseReport(
    case="attention/64x128",
    op="attention",
    architecture="sm_90",
    needs_tensor_cores=True,
    kernels=[KERNEL],
    temporary_bytes=4096,
    moved_bytes=1_020_000,
    floor_bytes=1_000_000,
)


def with_kernel(**changes):
    return dataclasses.replace(GOOD, kernels=[dataclasses.replace(KERNEL, **changes)])


BAD = {
    "8 bytes spilled, 0 instructions on local": with_kernel(spilled_bytes=8),
    "0 bytes spilled, 2 instructions on local": with_kernel(local_instructions=2),
    "narrow loads, {'32': 40, '8': 3}": with_kernel(load_bits={"32": 40, "8": 3}),
    "narrow loads, {}": with_kernel(load_bits={}),
    "no tensor-core instruction": with_kernel(tensor_core_instructions=0),
    "1.060 of the floor in bytes, over 1.05": dataclasses.replace(GOOD, moved_bytes=1_060_000),
    "no kernel in the program": dataclasses.replace(GOOD, kernels=[]),
    "refused: ValueError: no": dataclasses.replace(GOOD, kernels=[], refusal="ValueError: no"),
}


def test_a_good_report_passes():
    assert judge([GOOD], {}) == []
    assert faults(with_kernel(load_bits={"bulk": 2, "32": 40})) == []
    without = dataclasses.replace(with_kernel(tensor_core_instructions=0), needs_tensor_cores=False)
    assert judge([without], {}) == []
    spilled = dataclasses.replace(
        with_kernel(spilled_bytes=8, local_instructions=2), most_spilled=8
    )
    assert faults(spilled) == []
    assert faults(dataclasses.replace(spilled, most_spilled=4)) == [
        "attention: 8 bytes spilled, 2 instructions on local memory"
    ]
    wide = dataclasses.replace(GOOD, moved_bytes=1_200_000, most_bytes=1.25)
    assert judge([wide], {}) == []
    assert "over 1.25" in judge([dataclasses.replace(wide, moved_bytes=1_260_000)], {})[0]


@pytest.mark.parametrize("fault", BAD)
def test_the_judge_says_no(fault):
    found = judge([GOOD, BAD[fault]], {})
    assert [fault in line for line in found] == [True], found
    assert found[0].startswith("attention/64x128 on sm_90: ")


def test_nothing_compiled_is_a_fault():
    assert judge([], {}) == ["no case was compiled"]


def test_known_refusals_are_allowed_and_their_end_is_noticed():
    refused = dataclasses.replace(GOOD, kernels=[], refusal="NotImplementedError: needs sm_90")
    for key in ("attention/64x128", "attention/64x128 on sm_90"):
        assert judge([refused], {key: "needs sm_90"}) == []
        assert "refused: NotImplementedError" in judge([refused], {key: "another reason"})[0]
        assert (
            "expected to be refused (needs sm_90), got compiled"
            in judge([GOOD], {key: "needs sm_90"})[0]
        )


def test_a_part_of_the_cases_may_refuse_what_it_is_known_to():
    (first, *_) = (key.removesuffix(" on sm_80") for key in REFUSALS)
    assert refusals_of([(first, "sm_80"), (GOOD.case, "sm_80")]) == {
        f"{first} on sm_80": "device: expected sm_90 or newer, got sm_80"
    }
    assert refusals_of([(first, "sm_90")]) == {}


def test_a_stale_table_is_noticed(tmp_path):
    file = tmp_path / "gpu-gate.json"
    assert "got none" in stale([GOOD], file)[0]
    file.write_text(json.dumps([as_json(GOOD)]))
    assert stale([GOOD], file) == []
    assert stale([with_kernel(registers=130)], file) == []  # as releases of the compiler differ
    assert "registers: expected 128, got 168" in stale([with_kernel(registers=168)], file)[0]
    more = dataclasses.replace(GOOD, moved_bytes=1_200_000)
    assert "bytes_over_floor: expected 1.02, got 1.2" in stale([more], file)[0]
    other = dataclasses.replace(GOOD, case="attention/16x64")
    assert len(stale([other], file)) == 2
    assert "refusal" in stale([BAD["refused: ValueError: no"]], file)[0]


def test_some_cases_replace_themselves_in_the_table(tmp_path):
    file = tmp_path / "gpu-gate.json"
    assert merged([GOOD], file) == [GOOD]
    other = dataclasses.replace(GOOD, architecture="sm_100")
    file.write_text(json.dumps([as_json(x) for x in (other, GOOD)]))
    changed = with_kernel(registers=99)
    assert merged([changed], file) == [changed, other]


def test_reports_survive_json():
    for report in (GOOD, *BAD.values()):
        assert from_json(json.loads(json.dumps(as_json(report)))) == report


SASS = """
.L_x_0:
        /*0010*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0020*/              @!P0 LDG.E.U16 R8, [R2.64+0x40] ;
        /*0030*/                   HMMA.16816.F32 R12, R4, R8, RZ ;
        /*0040*/                   FFMA R1, R2, R3, R4 ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R9], [R10.64] ;
        /*0060*/              @P1  BRA `(.L_x_0) ;
        /*0070*/                   STL [R1], R2 ;
        /*0080*/                   EXIT ;
.L_x_1:
        /*0090*/                   BRA `(.L_x_1);
"""


def test_instructions_are_counted_and_loops_found():
    instructions, labels = sass._parse(SASS)
    assert len(instructions) == 9
    mix = sass.count_kinds(instructions)
    assert mix["load 128"] == 2
    assert (mix["load 16"], mix["tensor core"], mix["local memory"]) == (1, 1, 1)
    ((start, end),) = sass._innermost(instructions, labels)
    loop = sass.Loop(instructions=end - start, mix=sass.count_kinds(instructions[start:end]))
    assert (loop.instructions, loop.loaded_bytes) == (6, 2 * 16 * 32)
    # 1,024 bytes at 10 a cycle take 102.4 cycles, in which 4 schedulers issue 409.6 instructions.
    assert loop.issue_ceiling(10.0) == pytest.approx(409.6 / 6)
    code = sass.Code(
        registers=128,
        stack_bytes=0,
        spilled_bytes=0,
        static_shared_bytes=0,
        instructions=9,
        mix=mix,
        loops=[loop],
    )
    report = kernel_report("k", code, load_target("h100"), shared_bytes=1024, warps=4)
    # 65,536 registers hold 16 warps of 128 each, of the 64 that there could be.
    assert report.occupancy == 16 / 64
    assert report.local_instructions == 1


HLO = """HloModule m

%body (p: (s32[], u8[64,1024], f32[8])) -> (s32[], u8[64,1024], f32[8]) {
  %p = (s32[], u8[64,1024]{1,0}, f32[8]{0}) parameter(0)
  %pool = u8[64,1024]{1,0} get-tuple-element(%p), index=1
  %i = s32[] get-tuple-element(%p), index=0
  %acc = f32[8]{0} get-tuple-element(%p), index=2
  %read = f32[8]{0} fusion(%pool, %i, %acc), kind=kLoop, calls=%fused
  ROOT %out = (s32[], u8[64,1024]{1,0}, f32[8]{0}) tuple(%i, %pool, %read)
}

%fused (a: u8[64,1024], b: s32[], c: f32[8]) -> f32[8] {
  %a = u8[64,1024]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %c = f32[8]{0} parameter(2)
  %row = u8[1,1024]{1,0} dynamic-slice(%a, %b, %b), dynamic_slice_sizes={1,1024}
  ROOT %sum = f32[8]{0} add(%c, %c)
}

ENTRY %main (x: u8[64,1024], y: f32[8], z: u8[100]) -> f32[8] {
  %x = u8[64,1024]{1,0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %z = u8[100]{0} parameter(2)
  %zero = s32[] constant(0)
  %t = (s32[], u8[64,1024]{1,0}, f32[8]{0}) tuple(%zero, %x, %y)
  %loop = (s32[], u8[64,1024]{1,0}, f32[8]{0}) while(%t), condition=%c, body=%body
  %got = f32[8]{0} get-tuple-element(%loop), index=2
  %kernel = (u8[100]{0}, /*index=1*/f32[8]{0}) custom-call(%z, %got), custom_call_target="k", \
output_to_operand_aliasing={{0}: (0, {})}, api_version=1
  ROOT %end = f32[8]{0} get-tuple-element(%kernel), index=1
}
"""


def test_bytes_are_read_off_the_program():
    # A pass of the loop reads a row of 1,024 bytes, an index of 4 and 32 bytes, and writes 32; the
    # kernel reads 32 bytes and writes 32, and 100 in the place of its first operand.
    assert hlo.moved_bytes(HLO, trips=10) == 10 * (1024 + 4 + 32 + 32) + 32 + 100 + 32
    viewed = HLO.replace("%kernel =", "%view = u8[10,10]{1,0} bitcast(%y)\n  %kernel =", 1)
    viewed = viewed.replace("custom-call(%z, %got)", "custom-call(%z, %got, %y, %view)")
    assert hlo.moved_bytes(viewed, trips=10) - hlo.moved_bytes(HLO, trips=10) == 32  # y, once
    copied = HLO.replace(
        "ROOT %end = f32[8]{0} get",
        "%more = u8[64,1024]{1,0} copy(%x)\n  ROOT %end = f32[8]{0} get",
    )
    assert hlo.moved_bytes(copied, trips=10) - hlo.moved_bytes(HLO, trips=10) == 2 * 65536


def test_the_table_in_the_repository_is_of_these_cases_and_passes():
    reports = [from_json(x) for x in json.loads((DOCS / "gpu-gate.json").read_text())]
    assert judge(reports, REFUSALS) == []
    assert (DOCS / "gpu-gate.md").read_text() == gate_page(reports)
    # That none is missing is for the gate to say, which makes the table.
    cases = {case.name: case for case in gate_cases()}
    assert {x.case for x in reports} <= cases.keys()
    for op in {x.op for x in reports}:
        assert {(x.case, x.architecture) for x in reports if x.op == op} == {
            (name, architecture)
            for name, case in cases.items()
            for architecture in ("sm_80", "sm_90", "sm_100")
            if case.op == op
        }
    assert all(x.floor_bytes == cases[x.case].floor_bytes for x in reports if x.refusal is None)


def test_the_roofline_in_the_repository_is_that_of_the_layout():
    compiled = json.loads((DOCS / "roofline.json").read_text())
    page = roofline_page([load_target(name) for name in NAMES], compiled, "h100")
    assert (DOCS / "roofline.md").read_text() == page
    assert "Computed, not timed" in page
    for shape in SHAPES:
        layout = CacheLayout(layers=1, kv_heads=shape.kv_heads, head_dim=shape.dim, fine_rows=32)
        order, tables = shape.kv_heads * 64, 4 + 5
        whole = layout.sealed_page_bytes + layout.fine_chunk_bytes - order - tables
        assert page_bytes(shape, "mixed") == whole
        sizes = [step_bytes(shape, level, *COMPILED) for level in LEVELS]
        assert sizes == sorted(sizes, reverse=True)
        assert all(
            compiled[shape.name][x] > step_bytes(shape, x, *COMPILED) / shape.layers for x in LEVELS
        )
