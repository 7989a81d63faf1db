"""Configuration: TOML file, drop-ins, environment, flags; later ones win. Frozen once loaded; a key that nobody knows is an error."""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_type_hints

import msgspec

from cri.errors import ConfigError

DEFAULT_FILE = Path("/etc/cri-shim/config.toml")
ENVIRONMENT_PREFIX = "CRI_SHIM_"
#: Beginnings of variables with our prefix that are not configuration: the file itself, and the failpoints of tests.
ENVIRONMENT_OTHER = ("CRI_SHIM_CONFIG", "CRI_SHIM_FAIL")
#: sun_path with its NUL.
SOCKET_PATH_MAX = 107

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_HANDLER_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?|")
_RLIMIT = re.compile(r"RLIMIT_(AS|CORE|CPU|DATA|FSIZE|LOCKS|MEMLOCK|MSGQUEUE|NICE|NOFILE|NPROC|RSS|RTPRIO|RTTIME|SIGPENDING|STACK)")


class Seconds(float):
    """A duration, written ``"1m30s"`` in a file."""

    @classmethod
    def parse(cls, text: object) -> Seconds:
        """Like Go's durations, without sign; ``"0"`` is allowed."""
        if text == "0":
            return cls(0)
        if not isinstance(text, str) or not text or _DURATION.sub("", text):
            raise ValueError(f'expected a duration such as "90s" or "1m30s", got {text!r}')
        return cls(sum(float(number) * _UNITS[unit] for number, unit in _DURATION.findall(text)))

    def __str__(self) -> str:
        for unit in ("h", "m", "s"):
            if self >= _UNITS[unit] and self % _UNITS[unit] == 0:
                return f"{int(self / _UNITS[unit])}{unit}"
        return f"{round(self * 1000)}ms" if self else "0"


def _absolute(path: str) -> None:
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise ValueError(f"expected an absolute path without '..', got {path!r}")


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One table of the file."""


class Log(Section, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"
    #: False: List*, *Status and statistics that succeed are not logged (a kubelet asks some 50 times a second on a full node).
    polls: bool = True


class Cgroup(Section, frozen=True):
    driver: Literal["auto", "cgroupfs", "systemd"] = "auto"
    #: Where supervisor, stdio and helpers live; outside of every pod's cgroup, so that a pod's OOM never takes them. A path (cgroupfs, by
    #: default /cri-shim), or the slice of their scope (systemd, by default system.slice).
    runtime_cgroup: str = ""

    def __post_init__(self) -> None:
        if self.runtime_cgroup and not self.runtime_cgroup.endswith(".slice"):
            _absolute(self.runtime_cgroup)


NATIVE_PLUGINS: Final = ("loopback", "bridge", "ptp", "host-local", "portmap", "bandwidth", "firewall", "tuning")


class Cni(Section, frozen=True):
    conf_dir: str = "/etc/cni/net.d"
    bin_dirs: tuple[str, ...] = ("/opt/cni/bin", "/usr/lib/cni")
    #: Plugins that are not executed where a network has no others.
    native_plugins: tuple[str, ...] = NATIVE_PLUGINS
    #: Of one execution of a plugin.
    timeout: Seconds = Seconds(60)
    #: A file in Go's template language from which a configuration is made when the kubelet tells the pod CIDR, if there is none yet.
    conf_template: str = ""

    def __post_init__(self) -> None:
        for path in (self.conf_dir, *self.bin_dirs, *filter(None, (self.conf_template,))):
            _absolute(path)
        if not self.bin_dirs or any(":" in path for path in self.bin_dirs):
            raise ValueError("bin_dirs: at least one directory, without ':' in its path")
        if self.timeout < 1:
            raise ValueError("timeout: at least one second")
        for name in self.native_plugins:
            if name not in NATIVE_PLUGINS:
                raise ValueError(f"native_plugins: {name[:40]!r} is none of {', '.join(NATIVE_PLUGINS)}")


class Network(Section, frozen=True):
    mode: Literal["cni", "bridge"] = "cni"
    #: Built-in mode: one range per address family.
    subnets: tuple[str, ...] = ("10.88.0.0/16",)
    cni: Cni = Cni()

    def __post_init__(self) -> None:
        versions = [ipaddress.ip_network(subnet).version for subnet in self.subnets]
        if len(set(versions)) != len(versions):
            raise ValueError("at most one subnet of each address family")


class Images(Section, frozen=True):
    #: containerd's hosts.toml layout, one directory per registry host.
    registry_dir: str = "/etc/cri-shim/certs.d"
    #: Credentials of the node, in the layout of Docker's config.json; asked where a pull comes without.
    auth_file: str = ""
    max_parallel_pulls: int = 4
    #: Layers of one pull.
    max_parallel_layers: int = 3
    #: A pull without a new byte for this long is given up.
    progress_timeout: Seconds = Seconds(60)
    #: References that the kubelet's garbage collection is asked to spare.
    pinned: tuple[str, ...] = ()
    #: Image stores of other cri-shims (their root, or its ``images``), read-only.
    additional_stores: tuple[str, ...] = ()
    #: A containers-policy.json(5); empty: everything may be pulled and run.
    signature_policy: str = ""

    def __post_init__(self) -> None:
        for path in filter(None, (self.registry_dir, self.auth_file, self.signature_policy, *self.additional_stores)):
            _absolute(path)
        if self.max_parallel_pulls < 1 or self.max_parallel_layers < 1:
            raise ValueError("parallelism must be at least 1")


class Streaming(Section, frozen=True):
    address: str = "127.0.0.1"
    #: 0: any free one.
    port: int = 0
    idle_timeout: Seconds = Seconds(4 * 3600)
    #: A session ends after so long even if it is busy; 0: never.
    session_timeout: Seconds = Seconds(0)
    tls_cert: str = ""
    tls_key: str = ""
    client_ca: str = ""

    def __post_init__(self) -> None:
        ipaddress.ip_address(self.address)
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port {self.port} is outside 0-65535")


class Handler(Section, frozen=True):
    """What ``cri.spec.inputs.HandlerConfig`` says of each."""

    #: Privileged containers get no devices of the host.
    privileged_without_host_devices: bool = False
    #: ... but may make and use any.
    privileged_without_host_devices_all_devices_allowed: bool = False
    #: "first": exec sessions of a container with a cpuset run on its first processor only, out of the way of the others.
    exec_cpu_affinity: str = ""
    #: For containers whose request names none: "" (unconfined), "runtime/default" or "localhost//path/of/profile.json".
    unset_seccomp_profile: str = ""
    #: Pods with a network of their own: everybody may listen on ports below 1024, and ping.
    unprivileged_ports: bool = True
    unprivileged_icmp: bool = True
    #: RLIMIT_X to (soft, hard); the others are those that the daemon was started with.
    rlimits: dict[str, tuple[int, int]] = {}
    #: A config.json (whole or partial) for what neither a request nor cri-shim says: mounts, limits, hooks, variables, devices, sysctls.
    base_runtime_spec: str = ""
    #: Exact names of annotations that are copied into the OCI specification.
    pod_annotations: tuple[str, ...] = ()
    container_annotations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, (soft, hard) in self.rlimits.items():
            if not _RLIMIT.fullmatch(name) or not 0 <= soft <= hard < 2**63:
                raise ValueError(f"rlimits: want RLIMIT_NAME = [soft, hard] with soft <= hard, got {name} = [{soft}, {hard}]")
        if self.base_runtime_spec:
            _absolute(self.base_runtime_spec)
        if self.exec_cpu_affinity not in ("", "first"):
            raise ValueError(f'exec_cpu_affinity: want "" or "first", got {self.exec_cpu_affinity!r}')
        if self.unset_seccomp_profile not in ("", "unconfined", "runtime/default"):
            if not self.unset_seccomp_profile.startswith("localhost/"):
                raise ValueError(f"unset_seccomp_profile: {self.unset_seccomp_profile!r} is not a profile")
            _absolute(self.unset_seccomp_profile.removeprefix("localhost/"))


class Runtime(Section, frozen=True):
    #: Devices by name, described in files below ``cdi_spec_dirs`` (Container Device Interface); later directories win.
    enable_cdi: bool = True
    cdi_spec_dirs: tuple[str, ...] = ("/etc/cdi", "/var/run/cdi")
    #: Block I/O classes by name (YAML, goresctrl's format), which the annotations of containers and pods ask for.
    blockio_config_file: str = ""
    #: Without that file: annotations that ask for a class are ignored, instead of failing the container.
    ignore_blockio_not_enabled_errors: bool = False
    #: RuntimeClass handler name to settings; "" is the default handler and always exists.
    handlers: dict[str, Handler] = {}

    def __post_init__(self) -> None:
        for path in (*self.cdi_spec_dirs, *filter(None, (self.blockio_config_file,))):
            _absolute(path)
        for name in self.handlers:
            if not _HANDLER_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a runtime handler name (lower-case letters, digits, '-' and '.')")


class Metrics(Section, frozen=True):
    #: "127.0.0.1:9464" to serve /metrics; empty for none.
    listen: str = ""

    def __post_init__(self) -> None:
        if self.listen:
            host, _, port = self.listen.rpartition(":")
            ipaddress.ip_address(host.strip("[]"))
            if not port.isdigit() or int(port) > 65535:
                raise ValueError(f"listen: {port!r} is not a port")


class Config(Section, frozen=True):
    """The whole file."""

    #: Images and records: survive a reboot.
    root: str = "/var/lib/cri-shim"
    #: Sockets, FIFOs, pinned namespaces, bundles: do not.
    state: str = "/run/cri-shim"
    #: Empty in the file: ``cri-shim.sock`` in the state directory.
    listen: str = ""
    log: Log = Log()
    cgroup: Cgroup = Cgroup()
    network: Network = Network()
    images: Images = Images()
    streaming: Streaming = Streaming()
    runtime: Runtime = Runtime()
    metrics: Metrics = Metrics()

    def __post_init__(self) -> None:
        _absolute(self.root)
        _absolute(self.state)
        if self.listen and not self.listen.startswith("unix:///"):
            raise ValueError(f"listen must be unix:///path, not {self.listen!r}")

    @property
    def socket(self) -> Path:
        """Path of the CRI socket."""
        return Path(self.listen.removeprefix("unix://"))

    def handler(self, name: str) -> Handler | None:
        """Settings of a runtime handler; None for one that is not configured."""
        return self.runtime.handlers.get(name)


def load(file: Path | None = None, flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """The effective configuration. ``file`` must exist if given; ``flags`` maps dotted keys to text. Raises ConfigError, one line."""
    environ = os.environ if environ is None else environ
    named = file or (Path(environ["CRI_SHIM_CONFIG"]) if environ.get("CRI_SHIM_CONFIG") else None)
    merged: dict[str, Any] = {}
    for source, layer in _layers(named, environ, flags or {}):
        _convert(source, layer)
        _merge(merged, layer)
    merged.setdefault("runtime", {}).setdefault("handlers", {}).setdefault("", {})
    config = _convert("configuration", merged)
    if not config.listen:
        config = msgspec.structs.replace(config, listen=f"unix://{config.state}/cri-shim.sock")
    _check(config)
    return config


def to_toml(config: Config) -> str:
    """The configuration as a file that would load to the same."""
    import tomli_w

    return tomli_w.dumps(msgspec.to_builtins(config, enc_hook=str))


def leaves(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and type of everything an operator would type: all but the handlers' tables."""
    for name, kind in get_type_hints(section).items():
        if name.startswith("__"):
            continue
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from leaves(kind, f"{prefix}{name}.")
        elif name != "handlers":
            yield f"{prefix}{name}", kind


def variable(key: str) -> str:
    """``network.cni.conf_dir`` → ``CRI_SHIM_NETWORK_CNI_CONF_DIR``."""
    return ENVIRONMENT_PREFIX + key.replace(".", "_").upper()


def flag(key: str) -> str:
    """``network.cni.conf_dir`` → ``--network-cni-conf-dir``."""
    return "--" + key.replace(".", "-").replace("_", "-")


def _layers(file: Path | None, environ: Mapping[str, str], flags: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    main = file or DEFAULT_FILE
    if file is not None or main.exists():
        yield str(main), _read(main)
    for dropin in sorted(main.with_name(main.name + ".d").glob("*.toml")):
        yield str(dropin), _read(dropin)
    kinds = dict(leaves())
    variables = {variable(key): key for key in kinds}
    for name in sorted(environ):
        if not name.startswith(ENVIRONMENT_PREFIX) or name.startswith(ENVIRONMENT_OTHER):
            continue
        if name not in variables:
            raise ConfigError(f"environment: {name} is not a variable of cri-shim")
        yield name, _nest(variables[name], _typed(name, kinds[variables[name]], environ[name]))
    for key, text in flags.items():
        yield flag(key), _nest(key, _typed(flag(key), kinds[key], text))


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _typed(source: str, kind: Any, text: str) -> Any:
    """Text of a flag or variable as the TOML value it stands for: lists are separated by commas."""
    if kind == tuple[str, ...]:
        return [part for part in text.split(",") if part]
    if kind is bool:
        if text not in ("true", "false"):
            raise ConfigError(f"{source}: expected true or false, got {text!r}")
        return text == "true"
    if kind is int:
        if not text.lstrip("-").isdigit():
            raise ConfigError(f"{source}: expected a whole number, got {text!r}")
        return int(text)
    return text


def _nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _convert(source: str, values: Mapping[str, Any]) -> Config:
    try:
        return msgspec.convert(values, Config, dec_hook=lambda kind, value: kind.parse(value))
    except (msgspec.ValidationError, ValueError) as error:
        text = str(error).replace("Object contains unknown field", "unknown key").replace("`$.", "`").replace(" - at ", " in ")
        raise ConfigError(f"{source}: {text[:1].lower()}{text[1:]}") from error


def _check(config: Config) -> None:
    """What only the whole can tell."""
    if len(os.fsencode(config.socket)) > SOCKET_PATH_MAX:
        raise ConfigError(f"listen: {config.socket} is longer than the {SOCKET_PATH_MAX} bytes a unix socket's path may have")
    if config.root == config.state:
        raise ConfigError("root and state must be different directories: one survives a reboot, the other must not")
    if config.network.mode == "bridge" and not config.network.subnets:
        raise ConfigError("network.subnets: the built-in bridge needs at least one")
    if bool(config.streaming.tls_cert) != bool(config.streaming.tls_key):
        raise ConfigError("streaming: tls_cert and tls_key go together")
    if config.streaming.client_ca and not config.streaming.tls_cert:
        raise ConfigError("streaming.client_ca: needs tls_cert and tls_key")
