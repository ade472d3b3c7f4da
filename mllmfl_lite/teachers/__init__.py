"""Frozen models on the server: CLIP, LLaVA, an ImageNet network, and the cache of their answers."""

from mllmfl_lite.teachers.clip import ClipTeacher, load_clip
from mllmfl_lite.teachers.imagenet import NETWORKS, ImageNetTeacher, load_imagenet
from mllmfl_lite.teachers.llava import MllmTeacher, load_mllm

__all__ = ["ClipTeacher", "ImageNetTeacher", "MllmTeacher", "load_clip", "load_imagenet", "load_mllm", "load_zero_shot"]


def load_zero_shot(name: str, device: str = "auto") -> ClipTeacher | ImageNetTeacher:
    """Load the teacher of that name that scores class names: a network of `NETWORKS`, else a CLIP."""
    return (load_imagenet if name.strip() in NETWORKS else load_clip)(name, device=device)
