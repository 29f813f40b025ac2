"""Several front ends before one scheduler (`--api-server-count`); docs/architecture.md has why so."""
