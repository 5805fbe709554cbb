"""The text of compiled programs: layouts, and how often loops turn, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from xclip_jax.parallel import hlo


@pytest.mark.parametrize(
    ("text", "plain", "padded", "in_hbm"),
    [
        ("f32[]", 4, 4, True),
        ("bf16[197,64]{1,0:T(8,128)(2,1)}", 197 * 64 * 2, 200 * 128 * 2, True),
        ("bf16[197,64]{0,1:T(8,128)(2,1)S(1)}", 197 * 64 * 2, 256 * 64 * 2, False),
        ("f32[3,5,200]{2,1,0:T(8,128)}", 3 * 5 * 200 * 4, 3 * 8 * 256 * 4, True),
        ("f32[1000]{0:T(1024)S(1)}", 4000, 4096, False),
        ("pred[16]{0}", 16, 16, True),
        ("s4[7]{0}", 3.5, 3.5, True),
    ],
)
def test_bytes_of_a_layout(text, plain, padded, in_hbm):
    (array,) = hlo.arrays(text)
    assert (array.bytes, array.padded_bytes, array.in_hbm) == (plain, padded, in_hbm)
    assert str(array) == text.partition("{")[0]


LOOP = """\
%condition (p: (f32[8], u32[])) -> pred[] {
  %p = (f32[8]{0}, u32[]{:T(128)}) parameter(0)
  %counter = u32[]{:T(128)} get-tuple-element(%p), index=1
  %limit = u32[]{:T(128)} constant(8), metadata={op_name="limit"}
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%body (p.1: (f32[8], u32[])) -> (f32[8], u32[]) {
  %p.1 = (f32[8]{0}, /*index=1*/u32[]{:T(128)}) parameter(0)
  %by = u32[]{:T(128)} constant(2)
  %x = f32[8]{0} get-tuple-element(%p.1), index=0
  %y = f32[8]{0} multiply(%x, %x)
  %counter.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=1
  %next = u32[]{:T(128)} add(%counter.1, %by)
  ROOT %t = (f32[8]{0}, u32[]{:T(128)}) tuple(%y, /*index=1*/%next)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %first = u32[]{:T(128)} constant(START)
  %copy.1 = u32[]{:T(128)} copy(%first)
  %start = (f32[8]{0}, u32[]{:T(128)}) tuple(%a, %copy.1)
  %w = (f32[8]{0}, u32[]{:T(128)}) while(%start), condition=%condition, body=%body
  ROOT %r = f32[8]{0} get-tuple-element(%w), index=0
}
"""


@pytest.mark.parametrize(("start", "turns"), [(0, 4), (1, 4), (4, 2), (7, 1)])
def test_a_loop_may_count_by_two_and_from_any_number(start, turns):
    program = hlo.parse(LOOP.replace("START", str(start)))
    counts = {each.instruction.name: each.count for each in program.executions(len)}
    assert (counts["y"], counts["a"]) == (turns, 1)
    assert program.computations["condition"]["limit"].source == "limit"


def multiplications(text):
    program = hlo.parse(text)
    inner = (each for outer in program.executions(len) for each in (outer, *program.inside(outer)))
    return sum(each.count for each in inner if each.instruction.opcode == "multiply")


def test_nested_loops_multiply():
    def twice(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.fori_loop(0, 5, lambda _, x: x * jnp.sin(x), x), x)

    assert multiplications(jax.jit(twice).lower(jnp.ones(64)).compile().as_text()) == 15


def test_the_branch_that_weighs_most_runs():
    def choose(x):
        return jax.lax.switch(jnp.int32(x[0]), [lambda x: x, lambda x: jnp.sort(x)[::-1], jnp.cos], x)

    program = hlo.parse(jax.jit(choose).lower(jnp.ones(64)).compile().as_text())
    names = [{each.instruction.opcode for each in program.executions(weigh)} for weigh in (len, lambda x: -len(x))]
    assert "sort" in names[0] and "sort" not in names[1]
