"""The shipped run files, one TOML each."""
