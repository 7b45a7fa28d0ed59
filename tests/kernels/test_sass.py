"""The static pipe model: machine code to loops, loops to clocks."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.harness import amdgcn, ptx, sass
from kernels.harness.machine_code import Instruction, Listing, counted_body, natural_loops, reachable

ENTRIES = Path(__file__).resolve().parents[2] / "calibration" / "compiled"
NVIDIA = sorted(sass.MULTIPROCESSORS)
# A loop with a forward branch inside, out-of-line code that jumps back, the trap and padding that ptxas appends.
SASS = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x00000a0000017a02 */
        /*0010*/              @!P6 BRA `(.L_x_0) ;
.L_x_6:
        /*0020*/                   LDS.128 R4, [R2+0x10] ;
        /*0030*/                   BSSY B0, `(.L_x_2) ;
        /*0040*/               @P4 BRA `(.L_x_9) ;
        /*0050*/                   MUFU.EX2 R5, R4 ;
.L_x_3:
        /*0060*/                   BSYNC B0 ;
.L_x_2:
        /*0070*/                   HMMA.16816.F32.BF16 R72, R8.reuse, R32, R72 ;
        /*0080*/              @!PT LDS RZ, [RZ] ;
        /*0090*/                   BRA.U UP1, `(.L_x_6) ;
.L_x_0:
        /*00a0*/                   STG.E desc[UR14][R6.64], R5 ;
        /*00b0*/                   EXIT ;
.L_x_9:
        /*00c0*/                   FADD R5, R5, R5 ;
        /*00d0*/                   BRA `(.L_x_3) ;
.L_x_7:
        /*00e0*/                   BRA `(.L_x_7);
        /*00f0*/                   NOP;
"""


def clocks(*lines, target="sm_90", num_warps=1):
    listing = sass.parse("".join(f"        /*{16 * at:04x}*/ {line} ;\n" for at, line in enumerate(lines)))
    priced = sass.clocks_by_pipe(listing.instructions, target, num_warps)
    assert priced.unpriced == ()
    return dict(priced.clocks)


def test_sass_is_read_with_guards_and_modifiers():
    listing = sass.parse(SASS)
    assert len(listing.instructions) == 16
    assert listing.instructions[1] == Instruction("BRA", "`(.L_x_0)", "!P6")
    assert listing.instructions[7].opcode == "HMMA.16816.F32.BF16"
    assert listing.successors[1] == (10, 2)
    assert listing.successors[9] == (2, 10)
    assert listing.successors[6] == (7,)
    assert listing.successors[11] == ()


def test_a_jump_back_from_out_of_line_code_is_no_loop():
    loops = natural_loops(sass.parse(SASS))
    assert [sorted(loop) for loop in loops] == [[2, 3, 4, 5, 6, 7, 8, 9, 12, 13]]


def test_the_trap_and_the_padding_are_not_counted():
    listing = sass.parse(SASS)
    assert reachable(listing) == frozenset(range(14))
    assert len(counted_body(listing, "whole", sass.is_matrix).instructions) == 14


def test_the_innermost_loop_with_a_matrix_instruction_is_counted():
    # 0 -> 1 -> 2 -> 3 -> 4 with loops 2..2, 1..3 and 5..6 (larger, but without one).
    names = ["MOV", "IADD3", "HMMA.16816.F32", "IADD3", "MOV", "FADD", "FADD", "FADD", "FADD", "EXIT"]
    successors = ((1,), (2,), (3, 2), (4, 1), (5,), (6,), (7,), (8,), (9, 5), ())
    listing = Listing(tuple(map(Instruction, names)), successors)
    assert [one.opcode for one in counted_body(listing, "matrix_loop", sass.is_matrix).instructions] == [names[2]]
    whole = counted_body(listing, "whole", sass.is_matrix)
    assert (len(whole.instructions), whole.inner_loops) == (10, 3)
    assert counted_body(listing, "largest_loop", sass.is_matrix).instructions[0].opcode == "FADD"


def test_a_kernel_without_the_loop_asked_for_is_refused():
    listing = Listing((Instruction("EXIT"),), ((),))
    with pytest.raises(ValueError, match="no loop of the machine code holds a matrix instruction"):
        counted_body(listing, "matrix_loop", sass.is_matrix)
    with pytest.raises(ValueError, match="the machine code has no loop"):
        counted_body(listing, "largest_loop", sass.is_matrix)


@st.composite
def flow_graphs(draw):
    size = draw(st.integers(1, 9))
    after = st.lists(st.integers(0, size - 1), max_size=3, unique=True).map(tuple)
    return Listing((Instruction("MOV"),) * size, tuple(draw(after) for _ in range(size)))


def reachable_without(listing, removed):
    found, left = set(), [0] if removed != 0 else []
    while left:
        at = left.pop()
        if at not in found:
            found.add(at)
            left.extend(after for after in listing.successors[at] if after != removed)
    return found


@given(flow_graphs())
def test_loops_are_those_whose_header_dominates_a_jump_back(listing):
    found = {}
    alive = reachable(listing)
    for at in sorted(alive):
        for header in listing.successors[at]:
            if at == header or at not in reachable_without(listing, header):
                # What reaches `at` without passing the header, by brute force.
                body = {header, at}
                while (
                    grown := {b for b in alive if b != header and set(listing.successors[b]) & (body - {header})} - body
                ):
                    body |= grown
                found.setdefault(header, set()).update(body if at != header else {header})
    assert sorted(map(sorted, found.values())) == sorted(map(sorted, natural_loops(listing)))


@pytest.mark.parametrize("target", NVIDIA)
def test_conversions_and_exponentials_run_at_16_lanes(target):
    # FlashMLA's analysis: 512 values through a conversion of 16 a clock take 32 clocks.
    sixteen_warp_instructions = ["F2F.BF16.F32 R0, R1"] * 16
    assert clocks(*sixteen_warp_instructions, target=target)["special"] == 32.0
    assert clocks("MUFU.EX2 R0, R1", target=target)["special"] == 2.0


@pytest.mark.parametrize(
    ("line", "target", "pipe", "expected"),
    [
        ("FFMA R0, R1, R2, R3", "sm_80", "fma", 0.5),
        ("FFMA R0, R1, R2, R3", "sm_90", "fma", 0.25),
        ("FFMA2 R0, R2, R4, R6", "sm_100", "fma", 0.5),
        ("HFMA2 R0, R1, R2, R3", "sm_90", "fma", 0.25),
        ("HFMA2 R0, R1, R2, R3", "sm_120", "fma", 0.5),
        ("HFMA2.BF16_V2 R0, R1, R2, R3", "sm_80", "fma", 0.5),
        ("IMAD.WIDE R0, R1, 0x2, R2", "sm_90", "imad", 0.5),
        ("LOP3.LUT R0, R1, 0xf, RZ, 0xc0, !PT", "sm_90", "alu", 0.5),
        ("PRMT R0, R1, 0x5410, R2", "sm_120", "alu", 0.5),
        ("F2FP.BF16.F32.PACK_AB R0, R1, R2", "sm_90", "alu", 0.5),
        ("IADD3 R0, R1, R2, RZ", "sm_120", "alu", 0.25),
        ("IADD.64 R0, R2, R4", "sm_120", "alu", 0.5),
        ("F2I.FTZ.NTZ R0, R1", "sm_120", "special", 16.0),
        ("SHFL.BFLY PT, R0, R1, 0x8, 0x1f", "sm_100", "shuffle", 1.0),
        ("LDS R0, [R1]", "sm_90", "shared", 1.0),
        ("LDS.U16 R0, [R1]", "sm_90", "shared", 1.0),
        ("LDS.64 R0, [R1]", "sm_90", "shared", 2.0),
        ("STS.128 [R1], R4", "sm_90", "shared", 4.0),
        ("LDSM.16.M88.4 R0, [R4]", "sm_90", "shared", 4.0),
        ("LDSM.16.MT88.2 R0, [R4]", "sm_90", "shared", 2.0),
        ("STSM.16.M88 [R4], R0", "sm_90", "shared", 1.0),
        ("LDGSTS.E.BYPASS.128 [R3], desc[UR14][R6.64], P6", "sm_90", "global", 4.0),
        ("LDG.E.U8 R0, desc[UR14][R6.64]", "sm_90", "global", 1.0),
        ("HMMA.16816.F32.BF16 R0, R4, R8, R0", "sm_80", "tensor", 2.0),
        ("HMMA.16816.F32 R0, R4, R8, R0", "sm_120", "tensor", 4.0),
        ("HMMA.1688.F32.TF32 R0, R4, R8, R0", "sm_80", "tensor", 2.0),
        ("IMMA.16832.S8.S8 R0, R4, R8, R0", "sm_80", "tensor", 2.0),
        ("QMMA.16832.F32.E4M3.E4M3 R0, R4, R8, R0", "sm_120", "tensor", 4.0),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0", "sm_90", "tensor", 16.0),
    ],
)
def test_pipes(line, target, pipe, expected):
    assert clocks(line, target=target)[pipe] == pytest.approx(expected)
    assert clocks(line, target=target, num_warps=8)[pipe] == pytest.approx(8 * expected)
    assert clocks(line, target=target)["issue"] == 0.25


def test_an_instruction_that_never_runs_takes_only_an_issue_slot():
    assert clocks("@!PT LDS RZ, [RZ]") == {"issue": 0.25}
    assert clocks("@P0 LDS R0, [R1]")["shared"] == 1.0


def test_what_has_no_price_is_named():
    body = [Instruction("UTCHMMA"), Instruction("NEWOP.X"), Instruction("UIADD3"), Instruction("BRA")]
    priced = sass.clocks_by_pipe(body, "sm_100", 1)
    assert priced.unpriced == ("NEWOP.X", "UTCHMMA")
    assert priced.clocks == {"issue": 1.0}


lines = st.lists(
    st.sampled_from(["FFMA R0", "IMAD R0", "LOP3.LUT R0", "LDS.128 R0", "HMMA.16816.F32 R0", "MUFU.EX2 R0", "BAR.SYNC"])
)


@given(lines, lines, st.sampled_from(NVIDIA), st.integers(1, 16))
def test_clocks_add_up_and_grow_with_warps(first, second, target, num_warps):
    together, one, other = (clocks(*part, target=target) for part in (first + second, first, second))
    assert together == pytest.approx({pipe: one.get(pipe, 0) + other.get(pipe, 0) for pipe in {**one, **other}})
    assert clocks(*first, target=target, num_warps=num_warps) == pytest.approx(
        {pipe: num_warps * value for pipe, value in one.items()}
    )


AMDGCN = """
\t.text
kernel:                                 ; @kernel
.Lfunc_begin0:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\ts_cbranch_scc1 .LBB0_3
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
\tbuffer_load_dwordx4 v[0:3], v4, s[4:7], 0 offen
\ts_waitcnt vmcnt(0)
\tds_read2_b64 v[8:11], v5 offset1:1
\tv_mfma_f32_16x16x16_bf16 a[0:3], v[62:63], v[10:11], 0
\tv_exp_f32_e32 v1, v2
\tv_mul_lo_u32 v1, v2, v3
\tv_pk_mul_f32 v[0:1], v[2:3], v[4:5]
\ts_add_i32 s0, s0, 1
\ts_cbranch_scc1 .LBB0_2
.LBB0_3:
\ts_endpgm
.Lfunc_end0:
\t.section\t.rodata
other:
\tv_mov_b32_e32 v0, v1
"""


def test_amdgcn_is_counted_by_pipe():
    listing = amdgcn.parse(AMDGCN)
    body = counted_body(listing, "matrix_loop", amdgcn.is_matrix)
    assert len(listing.instructions) == 12
    assert len(body.instructions) == 9
    # A quarter of 16 + 16 + 4 clocks of a SIMD; 8192 FLOP at 2048 a clock; 64 lanes of 16 bytes.
    expected = {"vmem": 16.0, "lds": 8.0, "mfma": 4.0, "valu": 9.0, "salu": 1.0}
    assert amdgcn.clocks_by_pipe(body.instructions, "gfx942", 1).clocks == expected
    doubled = {pipe: 2 * value for pipe, value in expected.items()}
    assert amdgcn.clocks_by_pipe(body.instructions, "gfx942", 2).clocks == doubled
    assert amdgcn.clocks_by_pipe(body.instructions, "gfx942", 1).unpriced == ()


@pytest.mark.parametrize(
    ("name", "clocks_of_a_compute_unit"),
    [
        ("v_mfma_f32_32x32x8_f16", 8),
        ("v_mfma_f32_16x16x32_fp8_fp8", 4),
        ("v_mfma_i32_16x16x32_i8", 4),
        ("v_mfma_f32_4x4x4_16b_f16", 1),
    ],
)
def test_mfma_takes_its_share_of_the_peak_rate(name, clocks_of_a_compute_unit):
    priced = amdgcn.clocks_by_pipe([Instruction(name)], "gfx942", 1)
    assert priced.clocks == {"mfma": clocks_of_a_compute_unit}


def test_unknown_cdna_targets_are_refused():
    with pytest.raises(ValueError, match="rates of gfx950 are not known"):
        amdgcn.clocks_by_pipe([], "gfx950", 1)


PTX = """
.visible .entry kernel(
)
{
	mov.u32 	%r1, 0;
$L__BB0_1:
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %f1 }, { %r2 }, { %r3 }, { %f1 };
	add.s32 	%r1, %r1, 1;
	setp.lt.s32 	%p1, %r1, %r9;
	@%p1 bra 	$L__BB0_1;
	ret;
}
"""


@pytest.mark.parametrize("times", [1, 4])
def test_unrolling_by_ptxas_is_noticed(times):
    loop = [Instruction("HMMA.16816.F32.BF16")] * times + [Instruction("BRA")]
    listing = Listing(tuple(loop), (*((at + 1,) for at in range(times)), (0,)))
    body = counted_body(listing, "matrix_loop", sass.is_matrix)
    assert ptx.unrolled_by(PTX, "matrix_loop", body) == times
    assert ptx.unrolled_by(PTX, "whole", body) == 1


def test_the_model_agrees_with_the_earlier_count_of_the_same_kernel():
    # Counted before this project had kernels, over a bf16 kernel of the same tiling: 7.2 clocks of shared memory per
    # token and KV head on sm_90 (tile of 128 tokens, 4 warps, head_dim 128).
    entry = json.loads((ENTRIES / "decode_attention-native-best.json").read_text(encoding="utf-8"))
    counts = [one["count"]["clocks"] for one in entry["targets"]["sm_90"]["configs"] if one["config"]["block_n"] == 128]
    assert counts[0]["shared"] == pytest.approx(7.2, rel=0.03)
