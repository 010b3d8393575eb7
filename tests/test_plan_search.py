"""The planner's decisions, on plans that are made up."""

import math
from collections import Counter

import pytest

from lact_jax.planning import tables
from lact_jax.planning.bounds import Bounds
from lact_jax.planning.cards import CARDS
from lact_jax.planning.measure import Measured
from lact_jax.planning.search import (
    Choice,
    Plan,
    distance,
    meshes,
    nearest_fitting,
    parse_mesh,
    ranked,
    sweep,
)

H200 = CARDS["h200"]


def program_of(size: int) -> Measured:
    return Measured(
        program="step", state={"all": size}, arguments=size, outputs=0, updated=0, gradients=0,
        kept=0, temporaries=0, model_flops=0, flops=0,
    )  # fmt: skip


class FakePlanner:
    """A device holds `state` / (fsdp x seq), and a remat policy keeps so much a clip."""

    KEPT = {"none": 400, "dots": 200, "selective": 120, "attention": 90, "full": 40}
    TIME = {"none": 3.0, "dots": 3.2, "selective": 3.4, "attention": 3.6, "full": 4.0}

    card = H200

    def __init__(self, state: int, given: Choice | None = None):
        self.state, self._given, self.compiled = state, given, []

    def given(self) -> Choice:
        return self._given

    def _shared(self, choice) -> int:
        return choice.mesh[1] * choice.mesh[2]

    def hopeless(self, choice) -> bool:
        return self.state // self._shared(choice) > 100

    def __call__(self, choice) -> Plan:
        self.compiled.append((choice.mesh, choice.remat))
        size = self.state // self._shared(choice) + self.KEPT[choice.remat] // choice.mesh[2]
        limits = Bounds(self.TIME[choice.remat] / choice.mesh[2], 0.1, 0.5 * choice.mesh[2])
        clips = choice.mesh[0] * choice.mesh[1]
        return Plan(choice, clips, (program_of(size),), limits, size <= 100)


def test_meshes_of_eight():
    found = meshes(8, tokens=4680)  # 4680 = 8 * 585
    assert len(found) == len(set(found)) == 10
    assert all(math.prod(shape) == 8 for shape in found)
    assert max(seq for _, _, seq in meshes(64, tokens=4680)) == 8


def test_the_distance_of_meshes_counts_doublings():
    assert distance((1, 8, 1), (1, 8, 1)) == 0
    assert distance((1, 8, 1), (1, 4, 2)) == distance((2, 4, 1), (1, 8, 1)) == 2


def test_the_nearest_that_fits_is_a_frugal_policy_on_the_same_mesh():
    planner = FakePlanner(state=80)
    plan = planner(Choice((1, 8, 1), "dots"))
    assert not plan.fits
    found = nearest_fitting(plan, meshes(8, 8), planner)
    assert found.choice == Choice((1, 8, 1), "attention")
    assert found.fits
    assert planner.compiled[1:] == [
        ((1, 8, 1), "full"), ((1, 8, 1), "selective"), ((1, 8, 1), "attention"),
    ]  # fmt: skip


def test_the_nearest_that_fits_may_be_another_mesh():
    planner = FakePlanner(state=640)
    plan = planner(Choice((1, 8, 1), "full"))
    assert not plan.fits
    found = nearest_fitting(plan, meshes(8, 8), planner)
    assert found.choice == Choice((1, 4, 2), "full")
    # (2, 4, 1) is as near, but its state alone is too much.
    assert planner.compiled == [((1, 8, 1), "full"), ((1, 4, 2), "full")]


def test_nothing_fits():
    planner = FakePlanner(state=10_000)
    plan = planner(Choice((1, 8, 1), "full"))
    assert nearest_fitting(plan, meshes(8, 8), planner) is None
    assert len(planner.compiled) == 1


def test_a_sweep_stops_at_the_first_policy_that_fits_and_ranks_by_time_a_clip():
    planner = FakePlanner(state=160)
    shapes = [(8, 1, 1), (1, 8, 1), (1, 4, 2), (1, 1, 8)]
    choices = [Choice(shape, remat) for shape in shapes for remat in ("full", "none", "dots")]
    found = list(sweep(choices, planner))
    tried = Counter(plan.choice.mesh for plan in found)
    # The state of (8, 1, 1) is too much; tokens in eight parts fit with everything kept.
    assert tried == {(1, 8, 1): 3, (1, 4, 2): 3, (1, 1, 8): 1}
    best = ranked(found)
    assert [plan.choice.mesh for plan in best if plan.fits] == [(1, 8, 1), (1, 4, 2), (1, 1, 8)]
    assert [plan.fits for plan in best] == [True] * 3 + [False] * 4
    assert best[0].seconds_per_clip == pytest.approx(4 / 8)
    lines = tables.sweep_text(best, H200).splitlines()
    assert lines[2].split("|")[1:3] == [" 1,8,1         ", "  full "]


def test_the_answer_has_the_plan_and_the_nearest_that_fits():
    planner = FakePlanner(80, Choice((1, 8, 1), "dots"))
    text, found = tables.answer(planner, meshes(8, 8))
    assert [plan.fits for plan in found] == [False, True]
    assert text.startswith("mesh 1,8,1, remat 'dots', 8 clips: DOES NOT FIT")
    last = text.splitlines()[-1]
    assert last.startswith("nearest: mesh 1,8,1, remat 'attention', 8 clips: fits")
    assert "nearest" not in tables.answer(planner, [])[0]

    text, found = tables.answer(FakePlanner(10_000, planner.given()), meshes(8, 8))
    assert text.endswith("nearest: nothing fits") and len(found) == 1

    text, found = tables.answer(FakePlanner(80, Choice((1, 8, 1), "full")), meshes(8, 8))
    assert "fits" in text and "nearest" not in text and len(found) == 1


def test_the_answer_to_a_sweep():
    text, found = tables.sweep_answer(FakePlanner(160), [(1, 8, 1), (1, 1, 8)], ["full", "dots"])
    assert found[0].choice == Choice((1, 8, 1), "full") and len(text.splitlines()) == 2 + 3 + 2
    text, found = tables.sweep_answer(FakePlanner(160), [(8, 1, 1)], ["full"])
    assert (text, found) == (
        "the state alone is too much for a device on each of these meshes", []
    )  # fmt: skip


@pytest.mark.parametrize("text", ["1,8", "1,8,x", "8"])
def test_a_mesh_that_is_not_three_numbers(text):
    with pytest.raises(ValueError, match=rf"--mesh={text}: give data,fsdp,seq"):
        parse_mesh(text)
