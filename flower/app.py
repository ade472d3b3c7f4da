"""What `pyproject.toml` names: both halves come from the package."""

from mllmfl_lite.flower_app import client, server

__all__ = ["client", "server"]
