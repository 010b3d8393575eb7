"""The chunk loop: against a sampler without a cache, and in what order it asks for what."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from model_fixtures import (
    CHANNELS,
    FRAMES,
    HEIGHT,
    MODELS,
    NUM_CHUNKS,
    WIDTH,
    compiled,
    random_inputs,
    random_params,
)
from numpy_twins import relative_error

from lact_jax.diffusion.sampler import (
    SamplerConfig,
    chunk_noise,
    context_noise,
    guide,
    sample_chunks,
)
from lact_jax.diffusion.solvers import make_schedule

SHAPE = (2, FRAMES, HEIGHT, WIDTH, CHANNELS)


def chunks_of_noise(count, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(SHAPE), jnp.float32) for _ in range(count)]


# A model whose velocity depends on the sample, the time and every committed chunk, in order.


def denoise(x, timestep, cache):
    history = sum(0.3**age * chunk for age, chunk in enumerate(reversed(cache)))
    return x - history * timestep[:, None, None, None, None] / 1000


def commit(x, cache):
    return (*cache, x)


def euler_twin(noises, steps, shift):
    """Every chunk by plain Euler in float64, given the finished ones."""
    sigmas = make_schedule("euler", steps, shift).sigmas
    finished = []
    for noise in noises:
        x = np.asarray(noise, np.float64)
        for now, after in itertools.pairwise(sigmas):
            timestep = np.full(len(x), np.floor(1000 * now))
            x = x + (after - now) * np.asarray(denoise(x, timestep, tuple(finished)))
        finished.append(x)
    return finished


@pytest.mark.parametrize("count", [1, 2, 7])
def test_chunk_loop_is_the_loop_written_out(count):
    noises = chunks_of_noise(count)
    got = sample_chunks(denoise, commit, (), iter(noises), make_schedule("euler", 5, 3.0))
    for mine, plain in zip(got, euler_twin(noises, 5, 3.0), strict=True):
        assert relative_error(mine, plain) < 1e-5


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_solvers_start_anew_for_every_chunk(solver):
    """Without memory, equal noise gives equal chunks: no solver state is carried over."""
    noise = chunks_of_noise(1)[0]
    schedule = make_schedule(solver, 4, 3.0)
    forgetful = sample_chunks(denoise, lambda x, cache: (), (), [noise] * 3, schedule)
    first, second, third = forgetful
    assert np.array_equal(first, second) and np.array_equal(first, third)


def test_each_chunk_is_committed_once_when_the_next_is_asked_for():
    events = []

    def logged_denoise(x, timestep, cache):
        events.append(("denoise", len(cache), float(timestep[0])))
        return denoise(x, timestep, cache)

    def logged_commit(x, cache):
        events.append(("commit", x))
        return commit(x, cache)

    def progress(chunk):
        events.append(("chunk", chunk))
        return lambda step, steps: events.append(("step", chunk, step, steps))

    schedule = make_schedule("unipc", 2, 3.0)
    sampler = sample_chunks(
        logged_denoise, logged_commit, (), iter(chunks_of_noise(3)), schedule, progress
    )
    assert not events  # nothing is computed before it is asked for
    finished = []
    for i, chunk in enumerate(sampler):
        finished.append(chunk)
        expected = [("chunk", i)] if i == 0 else [("commit",), ("chunk", i)]
        for step, timestep in enumerate(schedule.timesteps):
            expected += [("denoise", i, float(timestep)), ("step", i, step + 1, 2)]
        assert [e[:1] if e[0] == "commit" else e for e in events] == expected
        if i:
            assert events[0][1] is finished[i - 1]
        events.clear()
    assert len(finished) == 3 and not events  # the last chunk is never committed


def test_what_is_committed_is_the_finished_chunk_as_context():
    seen = []

    def logged_commit(x, cache):
        seen.append(x)
        return commit(x, cache)

    schedule, noises = make_schedule("euler", 2, 3.0), chunks_of_noise(3)
    sampled = sample_chunks(
        denoise, logged_commit, (), iter(noises), schedule, as_context=lambda i, x: (i + 2) * x
    )
    finished = list(sampled)
    assert len(seen) == 2
    for i, x in enumerate(seen):
        assert np.array_equal(x, (i + 2) * finished[i])


def test_a_given_solver_step_takes_the_place_of_the_own_one():
    schedule = make_schedule("unipc", 3, 3.0)
    calls = []

    def step(*args):
        calls.append(args)
        return schedule.solver.step(*args)

    noises = chunks_of_noise(2)
    given = list(sample_chunks(denoise, commit, (), noises, schedule, solver_step=step))
    assert len(calls) == 6
    for mine, own in zip(given, sample_chunks(denoise, commit, (), noises, schedule), strict=True):
        assert np.array_equal(mine, own)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("name", ["two sets cycled", "mixed"])
def test_cached_sampling_is_sampling_without_a_cache(name):
    """The twin runs the whole teacher-forced sequence again for every step of every chunk."""
    config = MODELS[name]
    run, params = compiled(config), random_params(config)
    x = random_inputs(1, 2)
    noises = [x.noise[:, 0, i] for i in range(NUM_CHUNKS)]
    schedule = make_schedule("unipc", 2, 3.0)
    text_kv = run.text_kv(params, x.text)
    sampled = sample_chunks(
        lambda x, t, cache: run.denoise(params, x, t, text_kv, cache),
        lambda x, cache: run.commit(params, x, text_kv, cache),
        run.init_cache(params, 1),
        iter(noises),
        schedule,
    )
    clean = jnp.zeros_like(x.clean)
    for i, (noise, got) in enumerate(zip(noises, sampled, strict=True)):

        def without_cache(x_chunk, timestep, _, i=i, clean=clean):
            copies = x.noise.at[:, 1, i].set(x_chunk)
            times = x.timestep.at[:, 1, i].set(timestep)
            return run.sequence(params, clean, copies, times, x.text)[0][:, 1, i]

        (want,) = sample_chunks(without_cache, None, None, [noise], schedule)
        assert relative_error(got, want) < 2e-5
        clean = clean.at[:, i].set(want)


# Guidance, noise and options.


def test_guidance_leads_away_from_the_negative_branch():
    text, negative = chunks_of_noise(2)
    both = jnp.concatenate([text, negative])
    for scale in (0.0, 1.0, 5.0):
        want = np.asarray(negative) + scale * (np.asarray(text) - np.asarray(negative))
        assert relative_error(guide(both, scale), want) < 1e-6


def test_guidance_of_one_is_no_guidance():
    assert not SamplerConfig(guidance_scale=1).guided
    assert not SamplerConfig(guidance_scale=1.0).guided
    assert SamplerConfig(guidance_scale=1.5).guided
    assert SamplerConfig(guidance_scale=0.0).guided


def test_noise_of_a_prompt_depends_on_its_index_and_the_chunk_alone():
    def noise(indices, seed=0, chunk=0):
        return np.asarray(chunk_noise(seed, indices, chunk, SHAPE[1:]))

    three = noise([4, 0, 2])
    assert three.shape == (3, *SHAPE[1:]) and three.dtype == np.float32
    for place, index in enumerate((4, 0, 2)):
        assert np.array_equal(noise([index])[0], three[place])
    others = noise([4], chunk=1)[0], noise([4], seed=1)[0], three[1]
    for other in others:
        assert not np.any(other == three[0])
    many = noise(list(range(500)))
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


def test_context_noise_of_a_prompt_is_its_own_and_not_that_of_its_chunks():
    def noise(draw, indices, seed=0, chunk=0):
        return np.asarray(draw(seed, indices, chunk, SHAPE[1:]))

    three = noise(context_noise, [4, 0, 2])
    for place, index in enumerate((4, 0, 2)):
        assert np.array_equal(noise(context_noise, [index])[0], three[place])
    others = [noise(context_noise, [4], chunk=1), noise(context_noise, [4], seed=1), three[1:]]
    others += [noise(chunk_noise, range(6), chunk=chunk) for chunk in range(3)]
    for other in others:
        assert not np.any(np.isin(three[0], other))


def test_config_makes_the_schedule_it_names():
    config = SamplerConfig(solver="dpm++", steps=7, shift=2.0)
    want = make_schedule("dpm++", 7, 2.0)
    assert config.schedule.solver is want.solver
    assert np.array_equal(config.schedule.sigmas, want.sigmas)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "heun"}, r"sample\.solver='heun'.*dpm\+\+.*euler.*unipc"),
        ({"steps": 0}, r"sample\.steps=0"),
        ({"shift": 0.0}, r"sample\.shift=0\.0"),
        ({"context_noise": -0.1}, r"sample\.context_noise=-0\.1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**options)
