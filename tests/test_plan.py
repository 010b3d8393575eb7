"""The planner's arithmetic on programs compiled for eight simulated devices.

Run as a script it prints what plans of a tiny run say beside what the devices hold.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_fixtures import CARD, equations
from run_fixtures import ROOT, quickly_compiled, script_env, tiny_config

from lact_jax.flops import count_jaxpr_flops
from lact_jax.hlo import Collective, collectives
from lact_jax.models.dit import abstract_params
from lact_jax.ops.attention import attend
from lact_jax.ops.layer_scan import scan_layers, unroll_layers
from lact_jax.pieces import Pieces
from lact_jax.planning import tables, virtual
from lact_jax.planning.bounds import bounds, collective_seconds, exchanges, fits
from lact_jax.planning.cards import CARDS, USABLE, find_card
from lact_jax.planning.measure import Measured, kept_bytes
from lact_jax.planning.programs import abstract_state, plan_mesh, with_whole_batch
from lact_jax.planning.search import Choice, Planner
from lact_jax.sharding import MeshConfig, state_shardings
from lact_jax.train_state import init_state

H200 = CARDS["h200"]
ONE, DATA, MIXED = (1, 1, 1), (8, 1, 1), (1, 4, 2)


# Real plans of a tiny run, in a process of its own.


def held(tree) -> int:
    """Bytes of arrays on the first device."""
    first = jax.devices()[0]
    shards = (s for x in jax.tree.leaves(tree) for s in x.addressable_shards)
    return sum(s.data.nbytes for s in shards if s.device == first)


def tiny(job: str, shape, **changes):
    """(a plan, what the first device holds of such a state by group)."""
    config = tiny_config(
        data__batch_size=8, train__trainable="attn_only", model__remat="full", **changes
    )
    devices = jax.devices()[: math.prod(shape)]
    planner = Planner(config, job, H200, devices)
    found = planner(Choice(shape, "full"))
    config = planner.config_of(found.choice)
    mesh = plan_mesh(config, devices)
    abstract = jax.eval_shape(lambda: init_state(config))
    shardings = state_shardings(mesh, abstract, abstract_params(config.model))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    state = jax.device_put(zeros, shardings)
    groups = {
        "parameters": (state.params, state.frozen),
        "moving average": state.ema,
        "optimiser": state.opt_state,
        "gradients": state.params,
    }
    return found, {name: held(tree) for name, tree in groups.items()}


def script() -> None:
    with quickly_compiled():
        result = {}
        jobs = [("train", ONE), ("train", DATA), ("train", MIXED), ("sample", MIXED)]
        named = {f"{job} {shape}": tiny(job, shape) for job, shape in jobs}
        named["train in pieces"] = tiny("train", ONE, model__unroll_layers=True)
        for name, (found, real) in named.items():
            result[name] = tables.as_json(found, H200) | {
                "held": real, "text": tables.plan_text(found, H200),
            }  # fmt: skip
        unrolled = tiny_config(data__batch_size=8, model__unroll_layers=True)
        try:
            Planner(unrolled, "train", H200, jax.devices())(Choice(DATA, "full"))
        except ValueError as error:
            result["unrolled"] = str(error)
        cut = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data"))
        try:
            Pieces(jnp.sin, ("layer",)).trace(jax.device_put(jnp.ones(8), cut))
        except ValueError as error:
            result["pieces"] = str(error)
    json.dump(result, sys.stdout)


@pytest.fixture(scope="module")
def plans():
    flags = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
    done = subprocess.run(
        [sys.executable, __file__],
        # Eight devices wait for one another in collectives: XLA must have threads for all of them.
        env=script_env(XLA_FLAGS=flags, JAX_PLATFORMS="cpu", NPROC="128"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("shape", [ONE, DATA, MIXED])
def test_the_planned_state_is_what_a_device_holds(plans, shape):
    plan = plans[f"train {shape}"]
    (step,) = plan["programs"]
    for name in ("parameters", "moving average", "optimiser"):
        assert step["state"][name] == plan["held"][name] > 0
    assert step["gradients"] == plan["held"]["gradients"]
    assert step["updated"] == sum(
        plan["held"][name] for name in ("gradients", "moving average", "optimiser")
    )
    # 8 clips of 6 x 4 x 4 x 16 and their text, 4 x 8, cut over data and fsdp; the empty text, the
    # step's number and the key are everywhere.
    clips = 8 // (shape[0] * shape[1])
    assert step["state"]["batch"] == 4 * (clips * (6 * 4 * 4 * 16 + 4 * 8) + 4 * 8 + 1 + 2)
    assert step["arguments"] == sum(step["state"].values())
    assert plan["clips"] == 8
    assert plan["peak"] == step["peak"] == (
        sum(step["state"].values()) + step["outputs"] + step["temporaries"]
    )


def test_layers_are_not_unrolled_on_a_mesh(plans):
    assert plans["unrolled"].startswith("model.unroll_layers=True: a mesh of several devices")
    assert plans["pieces"].startswith("pieces run on one device, the arguments are on ")


def test_a_step_in_pieces_is_planned_from_its_programs(plans):
    (step,), (whole,) = (plans[name]["programs"] for name in ("train in pieces", f"train {ONE}"))
    for name in ("state", "updated", "gradients", "kept", "model_flops", "flops"):
        assert step[name] == whole[name]
    # Before its backward pass all that layers keep is there.
    assert step["temporaries"] > step["kept"] > 0
    assert step["peak"] == pytest.approx(whole["peak"], rel=0.1)


def test_clips_on_eight_devices_are_the_flops_of_one_device(plans):
    one, eight = (plans[f"train {shape}"]["programs"][0] for shape in (ONE, DATA))
    assert one["flops"] == 8 * eight["flops"]
    assert one["model_flops"] == 8 * eight["model_flops"]
    assert one["flops"] > one["model_flops"]  # remat "full" runs the forward pass twice
    assert one["kept"] == pytest.approx(8 * eight["kept"], rel=0.01)


def test_what_devices_exchange(plans):
    assert plans[f"train {ONE}"]["programs"][0]["exchanges"] == []
    data = plans[f"train {DATA}"]["programs"][0]["exchanges"]
    assert {(row["kind"], row["place"]) for row in data} >= {("all-reduce", "outside")}
    mixed = plans[f"train {MIXED}"]["programs"][0]["exchanges"]
    kinds = {(row["kind"], row["place"], row["devices"]) for row in mixed}
    assert ("all-gather", "in the layer scan", 8) in kinds  # parameters
    assert ("all-to-all", "in the layer scan", 2) in kinds  # heads of window attention
    assert all(row["seconds"] > 0 and row["link"] == "NVLink" for row in data + mixed)


def test_sampling_plans_the_denoise_step_and_the_commit(plans):
    plan = plans[f"sample {MIXED}"]
    denoise, commit = plan["programs"]
    assert [denoise["program"], commit["program"]] == ["denoise step", "commit"]
    assert denoise["gradients"] == denoise["kept"] == 0
    # The commit writes the cache in place; the velocity of two prompts is the denoise step's.
    assert commit["updated"] == commit["state"]["cache"] == denoise["state"]["cache"] > 0
    assert denoise["updated"] == 0 and denoise["outputs"] > 0
    # It has no use for the keys and values that it replaces; they are there all the same.
    assert commit["arguments"] < sum(commit["state"].values()) < commit["peak"]
    assert {"denoise step, GB a device", "commit, GB a device"} <= {
        line.split("|")[1].strip() for line in plan["text"].splitlines() if line.startswith("| ")
    }


# Its parts.


def measured(**changes) -> Measured:
    return dataclasses.replace(
        Measured(
            program="step", state={}, arguments=0, outputs=0, updated=0, gradients=0, kept=0,
            temporaries=0, model_flops=0, flops=0,
        ),
        **changes,
    )  # fmt: skip


def collective(kind: str, size: int, group, **changes) -> Collective:
    return dataclasses.replace(
        Collective(kind, size, "f32", "main", False, 1, len(group), tuple(group), ""), **changes
    )


def unrolled(body, carry, layers):
    return unroll_layers([body] * len(layers), carry, layers)


@pytest.mark.parametrize("scan", [scan_layers, unrolled, jax.lax.scan])
def test_kept_is_what_layers_stack_for_the_backward_pass(scan):
    weights = jnp.ones((5, 7), jnp.float32)

    def loss(weights, x):
        body = jax.checkpoint(lambda x, w: (jnp.sin(x * w), None))
        return scan(body, x, weights)[0].sum()

    def called(weights, xs):
        add = jax.jit(lambda total, x: total + jax.grad(loss)(weights, x))
        return add(add(jnp.zeros_like(weights), xs[0]), xs[1])

    def accumulated(weights, xs):
        def body(total, x):
            return total + jax.grad(loss)(weights, x), None

        return jax.lax.scan(body, jnp.zeros_like(weights), xs)[0]

    x = jnp.ones(7, jnp.float32)
    one = jax.make_jaxpr(jax.grad(loss))(weights, x).jaxpr
    assert kept_bytes(one) == 5 * 7 * 4  # the input of each layer
    for microbatches in (accumulated, called):
        many = jax.make_jaxpr(microbatches)(weights, jnp.ones((3, 7), jnp.float32)).jaxpr
        assert kept_bytes(many) == 5 * 7 * 4


@pytest.mark.parametrize(("queries", "keys"), [(584, 512), (585, 512), (584, 511)])
def test_fused_attention_of_any_length_has_gradients(queries, keys):
    def loss(q, k, v):
        return attend(q, k, v).astype(jnp.float32).sum()

    shapes = [jax.ShapeDtypeStruct((1, n, 2, 128), jnp.bfloat16) for n in (queries, keys, keys)]
    with virtual.building_for(CARD):
        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*shapes)
    assert [x.shape for x in jaxpr.out_avals] == [x.shape for x in shapes]
    # Two matmuls forward, five backward, on even numbers of queries and keys.
    even = queries + queries % 2
    assert count_jaxpr_flops(jaxpr.jaxpr) == 7 * 2 * 2 * even * 512 * 128
    # A key that was added is left out.
    (forward,) = equations(jaxpr.jaxpr, "dot_product_attention_fwd_wrapper")
    assert (str(forward.params["mask_type"]) == "MaskType.PADDING") == bool(keys % 2)


def test_a_batch_is_planned_with_as_many_clips_as_its_mesh_can_share():
    config = tiny_config(data__batch_size=3, train__accumulation=3)
    mesh = plan_mesh(config, jax.devices()[:1])
    assert with_whole_batch(config, mesh).data.batch_size == 3

    class FourReplicas:
        shape = {"data": 2, "fsdp": 2, "seq": 2}

    assert with_whole_batch(config, FourReplicas).data.batch_size == 12


@pytest.mark.parametrize(
    ("kind", "group", "seconds"),
    [
        # 7/8 of 9 GB over NVLink, 450 GB/s; an all-reduce passes twice.
        ("all-gather", range(8), 7 / 8 * 9 / 450),
        ("all-reduce", range(8), 2 * 7 / 8 * 9 / 450),
        # One of each of eight nodes: 7/8 over one adapter, 50 GB/s.
        ("reduce-scatter", range(0, 64, 8), 7 / 8 * 9 / 50),
        # Eight nodes of eight: what a node lacks comes through eight adapters.
        ("all-gather", range(64), 56 / 64 * 9 / 8 / 50),
        ("all-to-all", range(64), 56 / 64 * 9 / 50),
    ],
)
def test_seconds_of_a_collective(kind, group, seconds):
    found = collective_seconds(collective(kind, 9_000_000_000, group), H200)
    assert found == pytest.approx(seconds)


def test_bounds_and_the_table_of_exchanges():
    gather = collective("all-gather", 9_000_000_000, range(8), in_scan=True, times=40)
    step = measured(
        state={"parameters": 24_000_000_000}, arguments=24_000_000_000,
        updated=12_000_000_000, gradients=3_000_000_000,
        kept=3_000_000_000, temporaries=10_000_000_000, flops=1978 * 10**12,
        collectives=(gather, gather, collective("all-reduce", 8, range(0, 64, 8))),
    )  # fmt: skip
    limits = bounds(step, H200)
    assert limits.compute == pytest.approx(2)
    assert limits.memory == pytest.approx(48 / 4800)
    rows = exchanges(step, H200)
    assert [(row.count, row.place, row.link) for row in rows] == [
        (80, "in the layer scan", "NVLink"), (1, "outside", "network"),
    ]  # fmt: skip
    assert rows[0].bytes == 80 * 9_000_000_000
    assert limits.communication == sum(row.seconds for row in rows)
    assert limits.seconds == limits.compute
    assert step.working == 4_000_000_000
    assert step.peak == 34_000_000_000


def test_a_program_fits_up_to_the_usable_memory():
    usable = int(USABLE * 143771 * 2**20)
    assert H200.usable == usable
    state = {"parameters": usable - 3, "cache": 1}  # a program may use less than is there
    assert fits(measured(state=state, arguments=usable - 3, temporaries=2), H200)
    assert not fits(measured(state=state, arguments=usable - 3, temporaries=2, outputs=1), H200)


# Groups of collectives, in each of the ways in which XLA writes them.
PROGRAM = """HloModule m, num_partitions=8

ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  ROOT %r = f32[4]{{0}} all-reduce(%x), {groups}, to_apply=%add
}}
"""


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("replica_groups={{0,3},{1,2},{4,5},{6,7}}", (0, 3)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(2)2}", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
        ("replica_groups={}", tuple(range(8))),
    ],
)
def test_the_first_group_of_a_collective(groups, first):
    (found,) = collectives(PROGRAM.format(groups=groups))
    assert (found.group, found.devices) == (first, len(first))


def test_the_state_is_known_without_compiling():
    planner = Planner(tiny_config(), "train", H200, jax.devices()[:1])
    config = planner.config
    state, _ = abstract_state(config, plan_mesh(config, jax.devices()[:1]))
    expected = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert planner.state_bytes(Choice(ONE, "none")) == expected
    assert not planner.hopeless(Choice(ONE, "none"))
    assert planner.given() == Choice(ONE, "none")
    small = dataclasses.replace(H200, memory=expected)
    assert dataclasses.replace(planner, card=small).hopeless(Choice(ONE, "none"))


# What is asked wrongly.


def test_an_unknown_card_names_the_known_ones():
    with pytest.raises(ValueError, match=r"--gpu=h20: did you mean h200.* a100, h100, h200"):
        find_card("h20")


@pytest.mark.parametrize("name", CARDS)
def test_every_card_has_its_description(name):
    text = CARDS[name].target
    assert f'device_description_str: "NVIDIA {name.upper()}"' in text
    assert f"device_memory_size: {CARDS[name].memory}\n" in text


@pytest.mark.parametrize("count", [0, 9, 20])
def test_gpus_that_are_no_whole_nodes(count):
    with pytest.raises(ValueError, match=rf"--gpus={count}: give 1 to 8, or a multiple of 8"):
        virtual.gpu_devices(H200, count)


def test_a_mesh_that_does_not_fit_is_an_error_before_anything_is_compiled():
    config = dataclasses.replace(tiny_config(), mesh=MeshConfig(1, 3, 1))
    with pytest.raises(ValueError, match=r"mesh=\(1, 3, 1\) needs 3 of 1 devices"):
        Planner(config, "train", H200, jax.devices()[:1]).given()


def test_without_the_plugin_a_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(virtual, "_distributions", lambda: iter(["jax", "jaxlib"]))
    with pytest.raises(ImportError, match=r"pip install 'lact-jax\[cuda13\]'.*cuda13-plugin==\d"):
        virtual.gpu_devices(H200, 8)
    monkeypatch.setattr(virtual, "_distributions", lambda: iter(["jax_cuda12_plugin"]))
    virtual.check_plugin()


def test_the_command_ends_in_a_message_where_the_card_is_unknown():
    done = subprocess.run(
        [sys.executable, "-m", "lact_jax.plan", "--config=tests/tiny_run.py", "--gpu=tpu"],
        env=script_env(), cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: --gpu=tpu: known cards are a100, h100, h200" in done.stderr


if __name__ == "__main__":
    script()
