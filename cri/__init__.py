"""The daemon: translate, decide, record."""

__version__ = "0.1.0"
