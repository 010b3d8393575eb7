"""Configuration: a ConfigDict and back, and an error that names the key for all that is wrong."""

import dataclasses

import pytest
from ml_collections import ConfigDict

from lact_jax.config import Config, default, parse
from lact_jax.models.lact import LaCTConfig


def with_key(key: str, value) -> ConfigDict:
    """The default with one dotted key set, whatever it was and whether it was there."""
    config = default().unlock()
    group = config
    *parents, name = key.split(".")
    for parent in parents:
        group = group[parent]
    with group.ignore_type():
        group[name] = value
    return config


def test_the_default_parses_to_the_default_dataclasses():
    assert parse(default()) == Config()


def test_nested_dicts_parse_like_a_configdict_and_are_not_changed():
    tree = {"seed": 3, "model": {"lact": {"muon": True}, "lact_cycle": ({}, {"muon": False})}}
    parsed = parse(tree)
    assert parsed.seed == 3
    assert [options.muon for options in parsed.model.lact] == [True, False]
    assert tree["model"]["lact"] == {"muon": True} and len(tree["model"]["lact_cycle"]) == 2
    assert parse(tree) == parsed


def test_changes_reach_their_field_and_no_other():
    config = default()
    config.train.lr = 1e-3
    config.model.patch_size = (1, 4, 2)
    parsed = parse(config)
    expected = dataclasses.replace(
        Config(),
        train=dataclasses.replace(Config().train, lr=1e-3),
        model=dataclasses.replace(Config().model, patch_size=(1, 4, 2)),
    )
    assert parsed == expected
    assert hash(parsed.model) == hash(expected.model)


def test_lact_cycle_gives_each_layer_its_changes_of_the_common_options():
    config = default()
    config.model.update(num_layers=4)
    config.model.lact.momentum = True
    config.model.lact_cycle = ({}, {"muon": True, "kv_cache_size": 7})
    model = parse(config).model
    common = LaCTConfig(momentum=True)
    other = LaCTConfig(momentum=True, muon=True, kv_cache_size=7)
    assert [options for _, options in model.layer_specs] == [common, other, common, other]
    assert model.period == 2


@pytest.mark.parametrize("value", [None, 0, 128])
def test_options_that_default_to_none_take_values_of_their_type(value):
    config = default()
    config.model.lact.kv_cache_size = value
    assert parse(config).model.lact[0].kv_cache_size == value
    with pytest.raises(TypeError):
        config.model.lact.kv_cache_size = "all"


def test_whole_numbers_serve_as_floats_but_not_the_other_way():
    parsed = parse({"train": {"lr": 1}})
    assert parsed.train.lr == 1.0 and type(parsed.train.lr) is float
    with pytest.raises(ValueError, match=r"train\.steps=1\.0: expected int"):
        parse({"train": {"steps": 1.0}})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.lrr", 1.0, r"unknown config key train\.lrr; did you mean train\.lr\?"),
        ("modle", 1, r"unknown config key modle; did you mean model\?"),
        ("model.lact.muonn", True, r"unknown config key model\.lact\.muonn; did .*muon\?"),
        ("sample.zzz", 1, r"unknown config key sample\.zzz; known: \["),
        ("train.steps", "many", r"train\.steps='many': expected int"),
        ("train.steps", True, r"train\.steps=True: expected int"),
        ("train.lr", "1e-3", r"train\.lr='1e-3': expected float"),
        ("model.lact.muon", 1, r"model\.lact\.muon=1: expected bool"),
        ("model.patch_size", 2, r"model\.patch_size=2: expected a tuple of 3"),
        ("model.patch_size", (2, 2), r"model\.patch_size=\(2, 2\): expected a tuple of 3"),
        ("model.patch_size", (1, 2, "2"), r"model\.patch_size\[2\]='2': expected int"),
        ("model.lact_cycle", ("muon",), r"model\.lact_cycle=\('muon',\): expected a tuple"),
        ("model.lact_cycle", ({"muom": True},), r"model\.lact\.muom; did you mean .*muon"),
        ("data", 3, r"'data': expected a group of keys, got 3"),
        ("data.options", "seed", r"data\.options='seed': expected a group of keys"),
    ],
)
def test_unknown_keys_and_wrong_types_are_named(key, value, message):
    with pytest.raises(ValueError, match=message):
        parse(with_key(key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", 0),
        ("train.accumulation", 0),
        ("train.save_every", 0),
        ("train.ema_decay", 1.0),
        ("train.trainable", "some"),
        ("train.schedule", "step"),
        ("train.warmup_steps", -1),
        ("train.lr", 0.0),
        ("data.num_frames", -3),
        ("data.height", 0),
        ("data.batch_size", 0),
        ("data.fps", 0.0),
        ("data.num_threads", -1),
        ("sample.weights", "raw"),
        ("sample.num_latent_frames", 0),
        ("sample.batch_size", 0),
        ("sample.solver", "heun"),
        ("sample.steps", 0),
        ("objective.frames_per_chunk", 0),
        ("objective.time_sampling", "normal"),
        ("objective.drop_text_prob", 1.5),
        ("objective.context_noise", 1.0),
        ("sample.context_noise", -0.5),
        ("model.mixer", "mamba"),
        ("model.gla.head_dim", 1000),
        ("model.remat", "some"),
        ("model.dtype", "float16"),
        ("model.num_heads", 7),
        ("model.lact.fw_head_dim", 1000),
        ("model.lact.w_init", "zeros"),
    ],
)
def test_values_out_of_range_are_named_with_their_key(key, value):
    with pytest.raises(ValueError) as raised:
        parse(with_key(key, value))
    message = str(raised.value)
    group, name = key.split(".")[-2:]
    assert group in message and f"{name}={value!r}" in message


def test_sampling_with_more_context_noise_than_in_training():
    config = default()
    config.sample.context_noise = 0.2
    with pytest.raises(ValueError, match=r"sample\.context_noise=0\.2 is over objective"):
        parse(config)
    config.objective.context_noise = 0.2
    assert parse(config).sample.context_noise == 0.2


@pytest.mark.parametrize("reader", ["sample", "validation"])
def test_an_average_that_is_not_kept_is_not_read(reader):
    config = default()
    config.train.ema_decay = 0.0
    config.sample.weights = config.validation.weights = "params"
    assert parse(config).train.ema_decay == 0
    config[reader].weights = "ema"
    with pytest.raises(ValueError, match=rf"{reader}\.weights='ema', but train\.ema_decay=0"):
        parse(config)


def test_a_batch_that_accumulation_does_not_divide():
    config = default()
    config.data.batch_size, config.train.accumulation = 6, 4
    with pytest.raises(ValueError, match=r"data\.batch_size=6 .* train\.accumulation=4"):
        parse(config)
    config.train.accumulation = 3
    assert parse(config).train.accumulation == 3
