"""What each teacher of stage 3 knows by itself: its first choice on the test images of `cifar10_mini`, one file each.

    python scripts/measure_teachers.py                # minutes; the ImageNet network needs two optional packages

Nothing is trained and nothing drawn, so there are no seeds. Files that are there are kept.
"""

import numpy as np
from sweep import RESULTS, laptop_run, options

from mllmfl_lite.data import load_images
from mllmfl_lite.data.longtail import class_groups
from mllmfl_lite.data.metrics import confusion_matrix, metrics_from_confusion
from mllmfl_lite.runs import load_federation, provenance, save_result
from mllmfl_lite.teachers import load_mllm, load_zero_shot

TEACHERS = {"tiny_clip": load_zero_shot, "tiny_llava": load_mllm, "efficientnet_lite2": load_zero_shot}


def measure(name: str) -> dict:
    """Accuracy, in all, by class and by the clients' groups, and how often each class is named."""
    test, teacher = load_images("cifar10_mini", "test"), TEACHERS[name](name, device="cpu")
    groups = class_groups(load_federation(laptop_run("fedavg", 0).experiment).train.class_counts())
    named = teacher.class_probabilities(test.images, test.names).argmax(1).numpy()
    metrics = metrics_from_confusion(confusion_matrix(test.labels, named, test.num_classes), groups)
    return {
        "label": name,
        "parameters": {"teacher": teacher.identity, "dataset": "cifar10_mini", "part": "test"},
        "summary": {**metrics, "named": (np.bincount(named, minlength=test.num_classes) / len(test)).tolist()},
        "data": {"test_sha256": test.checksum()},
        "provenance": provenance("cpu"),
    }


if __name__ == "__main__":
    chosen = options(__doc__, TEACHERS, RESULTS / "laptop" / "teachers").parse_args()
    for name in chosen.only:
        path = chosen.out / f"{name}.json"
        if not path.exists():
            save_result(path, measure(name))
            print(name, flush=True)
