"""CRI messages and an image's config to OCI specifications. Pure: what must be looked up on the host comes in through ``HostFacts``."""
