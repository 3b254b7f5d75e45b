"""Engines: plain process; others by entry point."""
