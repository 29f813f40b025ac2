"""Instances on other hosts than the server's (docs/decisions/138-hosts.md)."""
