"""A teacher that never saw CIFAR: a network trained on ImageNet, asked through ImageNet's own classes::

    teacher = load_imagenet()                        # EfficientNet-lite2, two optional packages
    teacher.class_probabilities(images, names)       # (N, C): zero-shot, from the 1,000 ImageNet classes
    teacher.features(images)                         # (N, D), unit length

A CIFAR-10 class has the probability of all ImageNet classes that mean it together (`IMAGENET_CLASSES`). The teacher
gives what `ClipTeacher` gives for methods: class logits, class features, image features, the cost of one image.
"""

from __future__ import annotations

from mllmfl_lite.teachers.clip import ClipTeacher, load_clip
from mllmfl_lite.teachers.imagenet import NETWORKS, ImageNetTeacher, load_imagenet


def load_zero_shot(name: str, device: str = "auto") -> ClipTeacher | ImageNetTeacher:
    """The teacher of that name that scores class names: a network of `NETWORKS`, or else a CLIP (see `load_clip`).

    Raises:
        TeacherError: it cannot be loaded.
    """
    return load_imagenet(name, device) if name in NETWORKS else load_clip(name, device=device)
