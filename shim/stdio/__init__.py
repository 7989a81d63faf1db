"""The process that owns the containers' output and input ends and writes the CRI logs. Stdlib only, one thread."""
