"""Passes that turn weights into codes."""
