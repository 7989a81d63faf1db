"""A container's root: planned as data (``plan``), then executed against the kernel in two halves (``ops``)."""
