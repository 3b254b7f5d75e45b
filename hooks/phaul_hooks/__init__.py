"""Hooks: what runs around a migration at the request of CRIU, docker or an operator."""
