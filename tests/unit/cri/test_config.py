from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri import config
from cri.errors import ConfigError


def load(tmp_path: Path, text: str = "", *, environ: dict[str, str] | None = None, flags: dict[str, str] | None = None) -> config.Config:
    file = tmp_path / "config.toml"
    file.write_text(text)
    return config.load(file, flags, environ or {})


def test_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    assert loaded.root == "/var/lib/cri-shim"
    assert loaded.listen == "unix:///run/cri-shim/cri-shim.sock"
    assert loaded.network.mode == "cni"
    assert loaded.network.cni.timeout == 60
    assert loaded.handler("") == config.Handler()
    assert loaded.handler("other") is None


def test_later_layers_win_and_lists_are_replaced(tmp_path: Path) -> None:
    dropins = tmp_path / "config.toml.d"
    dropins.mkdir()
    (dropins / "20.toml").write_text('[log]\nlevel = "error"\n[runtime.handlers.a]\n')
    (dropins / "10.toml").write_text('[log]\nlevel = "warning"\nformat = "json"\n')
    text = '[network]\nmode = "bridge"\nsubnets = ["10.1.0.0/16"]\n[runtime.handlers.b]\nprivileged_without_host_devices = true\n'
    loaded = load(
        tmp_path,
        text,
        environ={"CRI_SHIM_NETWORK_SUBNETS": "10.2.0.0/16,fd00::/64", "CRI_SHIM_STATE": "/run/a", "PATH": "/bin"},
        flags={"state": "/run/b", "images.max_parallel_pulls": "7", "network.cni.timeout": "1m30s"},
    )
    assert (loaded.log.level, loaded.log.format) == ("error", "json")
    assert loaded.network.subnets == ("10.2.0.0/16", "fd00::/64")
    assert loaded.state == "/run/b"
    assert str(loaded.socket) == "/run/b/cri-shim.sock"
    assert loaded.images.max_parallel_pulls == 7
    assert loaded.network.cni.timeout == 90
    assert set(loaded.runtime.handlers) == {"", "a", "b"}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("rooot = '/x'", "unknown key `rooot`"),
        ("[network.cni]\nconf = 1", "unknown key `conf` in `network.cni`"),
        ("root = 1", "expected `str`, got `int` in `root`"),
        ("root = 'relative'", "absolute"),
        ("root = '/a/../b'", "absolute"),
        ("listen = 'tcp://1.2.3.4:5'", "unix:///path"),
        ("root = '/a'\nstate = '/a'", "different directories"),
        ("state = '/" + "x" * 120 + "'", "longer than"),
        ("[log]\nlevel = 'loud'", "loud"),
        ("[network]\nmode = 'bridge'\nsubnets = []", "at least one"),
        ("[network]\nsubnets = ['10.0.0.0/16', '10.1.0.0/16']", "address family"),
        ("[network]\nsubnets = ['10.0.0.1/16']", "host bits"),
        ("[network.cni]\ntimeout = '60'", "duration"),
        ("[network.cni]\ntimeout = 60", "duration"),
        ("[streaming]\ntls_cert = '/a'", "go together"),
        ("[streaming]\nport = 70000", "65535"),
        ("[images]\nsignature_policy = 'p'", "absolute path"),
        ("[metrics]\nlisten = 'localhost:1'", "localhost"),
        ("[runtime.handlers.'A b']", "handler name"),
        ("[runtime.handlers.a]\nrlimits = { RLIMIT_FILES = [1, 2] }", "RLIMIT_FILES"),
        ("[runtime.handlers.a]\nrlimits = { RLIMIT_NOFILE = [2, 1] }", "soft <= hard"),
        ("[runtime.handlers.a]\nunset_seccomp_profile = 'default'", "not a profile"),
        ("[runtime.handlers.a]\nunset_seccomp_profile = 'localhost/a.json'", "absolute"),
        ("a = ", "config.toml"),
    ],
)
def test_mistakes_are_one_line_that_names_the_place(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_in_environment_and_flags_name_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="CRI_SHIM_ROOTS is not a variable"):
        load(tmp_path, environ={"CRI_SHIM_ROOTS": "x"})
    with pytest.raises(ConfigError, match=r"^CRI_SHIM_LOG_LEVEL: "):
        load(tmp_path, environ={"CRI_SHIM_LOG_LEVEL": "x"})
    with pytest.raises(ConfigError, match=r"^--images-max-parallel-pulls: expected a whole number"):
        load(tmp_path, flags={"images.max_parallel_pulls": "x"})


def test_missing_file_is_an_error_only_when_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        config.load(tmp_path / "none.toml", environ={})
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        config.load(environ={"CRI_SHIM_CONFIG": str(tmp_path / "none.toml")})
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "none.toml")
    assert config.load(environ={}).root == "/var/lib/cri-shim"


def test_printed_configuration_loads_to_the_same(tmp_path: Path) -> None:
    handler = "[runtime.handlers.x]\nprivileged_without_host_devices = true\nrlimits = { RLIMIT_CORE = [0, 5] }\npod_annotations = ['a']\n"
    first = load(tmp_path, handler + '[images]\npinned = ["a"]\nprogress_timeout="1500ms"')
    text = config.to_toml(first)
    assert tomllib.loads(text)["images"]["progress_timeout"] == "1500ms"
    assert load(tmp_path, text) == first


def test_every_leaf_has_its_flag_and_variable() -> None:
    keys = [key for key, _ in config.leaves()]
    assert "network.cni.conf_dir" in keys
    assert config.variable("network.cni.conf_dir") == "CRI_SHIM_NETWORK_CNI_CONF_DIR"
    assert len({config.variable(k) for k in keys}) == len({config.flag(k) for k in keys}) == len(keys)


@given(st.integers(0, 10**8))
def test_durations_round_trip(milliseconds: int) -> None:
    value = config.Seconds(milliseconds / 1000)
    assert round(config.Seconds.parse(str(value)) * 1000) == milliseconds
