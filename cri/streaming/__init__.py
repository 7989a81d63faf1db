"""Exec, attach and port-forward: the HTTP server and its protocols, which are machines without I/O."""
