"""Where the scripts keep compiled programs."""

import jax
import pytest

from lact_jax import cli


@pytest.fixture
def cache_folder(monkeypatch, tmp_path):
    """The folder that JAX is told, with a user's cache folder and home under `tmp_path`."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv(cli.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def told():
        cli.use_compilation_cache()
        return jax.config.jax_compilation_cache_dir

    yield told
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_in_the_users_cache_folder(cache_folder, tmp_path):
    assert cache_folder() == str(tmp_path / "cache" / "lact_jax" / "jax")


def test_and_in_the_home_folder_where_there_is_none(cache_folder, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == str(tmp_path / ".cache" / "lact_jax" / "jax")


def test_the_environment_variable_of_jax_comes_first(cache_folder, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", "as JAX read it")
    monkeypatch.setenv(cli.CACHE_VARIABLE, "elsewhere")
    assert cache_folder() == "as JAX read it"
