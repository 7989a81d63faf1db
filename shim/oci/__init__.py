"""The OCI runtime specification as frozen types, its JSON codec, its validation and the bundle on disk."""
