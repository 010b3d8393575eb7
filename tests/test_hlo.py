"""The reader of compiled programs, on texts of known content in each of XLA's notations."""

import jax
import jax.numpy as jnp
import pytest

from lact_jax.hlo import Collective, collectives, count

MESH = "mesh['data'=2,'fsdp'=2,'seq'=2] {'fsdp','seq'}"
SPLIT = "mesh['a'=8] {'a':(4)2}"


def loop(body: str, turns: int) -> str:
    trips = f'{{"known_trip_count":{{"n":"{turns}"}}}}'
    return f"(s32[], f32[4,8]) while(%p), condition=%add, body=%{body}, backend_config={trips}"


TEXT = f"""HloModule jit_f, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

%inner (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {{
  %p = (s32[], f32[4,8]{{1,0}}) parameter(0)
  %x = f32[4,8]{{1,0}} get-tuple-element(%p), index=1
  %y = bf16[2,8]{{1,0}} convert(%x)
  %s = (f32[4,8], bf16[2,8]) all-reduce(%x, %y), replica_groups={{{{0,1}},{{2,3}}}}, \
metadata={{op_name="jit(f)/psum"}}
  ROOT %out = (s32[], f32[4,8]{{1,0}}) tuple(%p, %x)
}}

%wrapped (q: f32[16]) -> f32[4] {{
  %q = f32[16]{{0}} parameter(0)
  ROOT %scatter = f32[4]{{0}} reduce-scatter(%q), replica_groups=[2,4]<=[8], to_apply=%add
}}

%outer (p: (s32[], bf16[1,8])) -> (s32[], bf16[1,8]) {{
  %p = (s32[], bf16[1,8]{{1,0}}) parameter(0)
  %w = bf16[1,8]{{1,0}} get-tuple-element(%p), index=1
  %start = (bf16[1,8], bf16[4,8]) all-gather-start(%w), replica_groups={MESH}, dimensions={{0}}
  %done = bf16[4,8]{{1,0}} all-gather-done(%start)
  %loop = {loop("inner", 5)}
  ROOT %out = (s32[], bf16[1,8]{{1,0}}) tuple(%p, %w)
}}

ENTRY %main (p: bf16[1,8], g: f32[16]) -> f32[4] {{
  %p = bf16[1,8]{{1,0}} parameter(0)
  %g = f32[16]{{0}} parameter(1)
  %alone = f32[16]{{0}} all-reduce(%g), replica_groups={{{{0}},{{1}},{{2}},{{3}}}}, to_apply=%add
  %swap = f32[16]{{0}} all-to-all(%g), replica_groups={SPLIT}, dimensions={{0}}
  %loop = {loop("outer", 3)}
  %async = ((f32[16]{{0}}), f32[4]{{0}}) async-start(%g), calls=%wrapped
  ROOT %r = f32[4]{{0}} async-done(%async)
}}
"""


def test_every_notation_is_read():
    psum, scatter, gather, swap = collectives(TEXT)
    assert psum == Collective(
        "all-reduce", 4 * 8 * 4 + 2 * 8 * 2, "f32", "inner", True, 15, 2, (0, 1), "jit(f)/psum"
    )
    assert scatter == Collective(
        "reduce-scatter", 64, "f32", "wrapped", False, 1, 4, (0, 1, 2, 3), ""
    )
    # Four of the eight devices gather: two axes of the mesh.
    assert gather == Collective(
        "all-gather", 64, "bf16", "outer", True, 3, 4, (0, 1, 2, 3), ""
    )
    assert (swap.kind, swap.bytes, swap.times, swap.devices) == ("all-to-all", 64, 1, 2)
    assert count([psum, scatter, gather, gather]) == {
        ("all-reduce", True): 1, ("reduce-scatter", False): 1, ("all-gather", True): 2,
    }  # fmt: skip


def test_a_program_of_one_device_has_none():
    compiled = jax.jit(lambda x: jax.lax.scan(lambda c, y: (c * y, None), x, jnp.ones(3))[0])
    assert collectives(compiled.lower(jnp.float32(2)).compile().as_text()) == []


def test_what_is_not_a_program_is_refused():
    with pytest.raises(ValueError, match="not the text of a compiled XLA program"):
        collectives("module @jit_f { func.func public @main() }")
