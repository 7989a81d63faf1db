"""``cri-shim``: the daemon, and commands for people. Each command imports what it needs when it runs.

Nothing here or in ``config`` and ``startup`` imports grpc: ``serve`` spawns the supervisor first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cri
from cri import config as configuration
from cri.errors import ConfigError, StartError
from shim.errors import Failure

_SHORT = {"network.mode": "--network", "log.level": "--log-level", "log.format": "--log-format"}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: the command's; 2 for a wrong command line."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        command: Callable[[argparse.Namespace], int] = arguments.command
        return command(arguments)
    except BrokenPipeError:
        # `cri-shim config | head`: the reader has seen enough.
        sys.stderr.close()
        return 0
    except (ConfigError, StartError, Failure, OSError) as error:
        print(f"cri-shim: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cri-shim", description="A Kubernetes container runtime (CRI v1) in one Python program.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the daemon", description="Run the daemon until SIGTERM. Containers outlive it.")
    _configured(serve, _serve)
    show = commands.add_parser("config", help="print the effective configuration", description="Print the effective configuration as TOML.")
    _configured(show, _config)
    doctor = commands.add_parser(
        "doctor", help="check this machine", description="Check what cri-shim needs from this machine, and say how to fix it."
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object per check")
    _configured(doctor, _doctor)

    run = commands.add_parser(
        "run",
        help="run one pod with one container",
        description="Run one container in a pod of its own, stream its log, return its exit code, remove it.",
    )
    _client(run, _run)
    _run_options(run)
    pull = commands.add_parser("pull", help="pull an image", description="Pull an image through the daemon, with a progress bar.")
    _client(pull, _pull)
    pull.add_argument("--creds", default="", metavar="USER[:PASSWORD]", help="credentials; the password is asked for if it is left out")
    pull.add_argument("--quiet", "-q", action="store_true", help="print the image id only")
    pull.add_argument("image")

    image = commands.add_parser("image", help="list, remove, show, import and export images")
    _image_options(image.add_subparsers(required=True, metavar="VERB", dest="verb"))

    version = commands.add_parser("version", help="print versions of this program and of the daemon")
    _client(version, _version)
    return parser


def _run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("--network", choices=("pod", "host"), default="pod", help="the pod's own network (default), or the host's")
    run.add_argument("--name", default="", help="name of the pod (default: one made up)")
    run.add_argument("--env", "-e", action="append", default=[], metavar="NAME=VALUE", help="environment variable; repeatable")
    run.add_argument("--workdir", "-w", default="", help="working directory")
    run.add_argument("--user", "-u", default="", help="user id or name, and group id: 1000, nobody, 1000:1000")
    run.add_argument("--volume", "-v", action="append", default=[], metavar="HOST:CONTAINER[:ro]", help="bind mount; repeatable")
    run.add_argument("--hostname", default="", help="host name in the pod (default: its name)")
    run.add_argument("--memory", default="", metavar="SIZE", help="memory limit, e.g. 64m")
    run.add_argument("--cpus", type=float, default=0.0, help="CPU limit, e.g. 0.5")
    run.add_argument("--privileged", action="store_true", help="all capabilities and devices")
    run.add_argument("--read-only", action="store_true", help="read-only root file system")
    run.add_argument("--cgroup-parent", default="", help="parent cgroup of the pod")
    run.add_argument("--handler", default="", help="runtime handler")
    run.add_argument("--pull", choices=("missing", "always", "never"), default="missing", help="when to pull the image")
    run.add_argument("--stop-timeout", type=int, default=10, metavar="SECONDS", help="after Ctrl-C, before SIGKILL")
    run.add_argument("--quiet", "-q", action="store_true", help="no pull progress")
    run.add_argument("image")
    run.add_argument("cmd", nargs=argparse.REMAINDER, metavar="CMD", help="arguments for the image's entrypoint, or the command")


def _image_options(verbs: Any) -> None:
    ls = verbs.add_parser("ls", help="list images")
    ls.add_argument("--quiet", "-q", action="store_true", help="ids only")
    for verb, text in (("rm", "remove images, with all their names"), ("inspect", "show images as JSON")):
        verbs.add_parser(verb, help=text).add_argument("image", nargs="+", help="name, id or the beginning of an id")
    load = verbs.add_parser("import", help="import OCI layouts (directories or tar files) and docker archives")
    load.add_argument("--name", default="", help="repository, or repository:tag, instead of the names in the archive")
    load.add_argument("file", nargs="+")
    description = "Layers are put together anew from what is unpacked, so the image in the archive may have another id."
    save = verbs.add_parser("export", help="write an image to an archive", description=description)
    save.add_argument("--format", choices=("oci-archive", "oci-dir", "docker-archive"), default="oci-archive")
    save.add_argument("--compression", choices=("gzip", "zstd", "none"), default="gzip", help="of layers; a docker archive has none")
    save.add_argument("image")
    save.add_argument("file")
    for parser in verbs.choices.values():
        _client(parser, _image)


def _configured(parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], int]) -> None:
    parser.set_defaults(command=command)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help=f"configuration file (default {configuration.DEFAULT_FILE}, if it exists)"
    )
    group = parser.add_argument_group(
        "configuration", "Each key of the file; also as a CRI_SHIM_* variable. Lists are separated by commas."
    )
    for key, kind in configuration.leaves():
        names = [configuration.flag(key)]
        if _SHORT.get(key, names[0]) not in names:
            names.append(_SHORT[key])
        choices: Any = getattr(kind, "__args__", None) if getattr(kind, "__origin__", None) is not tuple else None
        group.add_argument(
            *names, dest=f"flag:{key}", choices=choices, metavar=None if choices else key.rpartition(".")[2].upper(), default=None
        )


def _client(parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], int]) -> None:
    parser.set_defaults(command=command)
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration file that names the daemon's socket")
    parser.add_argument("--socket", default="", metavar="PATH", help="socket of the daemon (default: the configuration's)")


def _load(arguments: argparse.Namespace) -> configuration.Config:
    flags = {name.removeprefix("flag:"): value for name, value in vars(arguments).items() if name.startswith("flag:") and value is not None}
    return configuration.load(arguments.config, flags)


def _socket(arguments: argparse.Namespace) -> str:
    return arguments.socket.removeprefix("unix://") or str(_load(arguments).socket)


def _serve(arguments: argparse.Namespace) -> int:
    from cri import startup

    config = _load(arguments)
    return startup.serve(config)


def _config(arguments: argparse.Namespace) -> int:
    print(configuration.to_toml(_load(arguments)), end="")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from cri import doctor

    return doctor.main(_load(arguments), as_json=arguments.json)


def _run(arguments: argparse.Namespace) -> int:
    from cri.commands import run

    return run.main(_socket(arguments), arguments)


def _pull(arguments: argparse.Namespace) -> int:
    from cri.commands import pull

    return pull.main(_socket(arguments), arguments.image, creds=arguments.creds, quiet=arguments.quiet)


def _image(arguments: argparse.Namespace) -> int:
    from cri.commands import image

    return image.main(_socket(arguments), arguments)


def _version(arguments: argparse.Namespace) -> int:
    from cri.commands import version

    return version.main(_socket(arguments), cri.__version__)


if __name__ == "__main__":
    sys.exit(main())
