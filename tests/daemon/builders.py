"""Where tests look for message builders: ``from tests.daemon.builders import pod_config``."""

from hack.messages import container_config, pod_config, unique

__all__ = ["container_config", "pod_config", "unique"]
