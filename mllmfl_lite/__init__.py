"""Federated learning on long-tailed images with a multimodal LLM on the server.

The small package behind the book. Each chapter uses one module; none of them knows a notebook.
"""

__version__ = "0.1.0"
