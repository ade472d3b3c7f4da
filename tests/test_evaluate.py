import numpy as np
import pytest
import torch

from mllmfl_lite.data.batches import Batches
from mllmfl_lite.data.longtail import class_groups
from mllmfl_lite.data.metrics import confusion_matrix, evaluate_model, metrics_from_confusion, predict
from mllmfl_lite.models import resnet8


def test_confusion_rows_are_true_classes():
    matrix = confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint64])
def test_confusion_does_not_overflow(kind):
    labels = np.arange(43)
    for pair in ((labels.astype(kind), labels), (labels, labels.astype(kind))):
        assert np.trace(confusion_matrix(*pair, 43)) == 43
    with pytest.raises(ValueError, match="invalid"):
        confusion_matrix(labels, labels + 1, 43)


def test_metrics_by_hand():
    matrix = np.array([[8, 2, 0], [5, 5, 0], [0, 0, 0]])
    metrics = metrics_from_confusion(matrix, {"head": [0, 1], "tail": [2], "few": []})
    assert metrics["top1"] == pytest.approx(13 / 20)
    assert metrics["per_class"] == [0.8, 0.5, None]
    assert metrics["groups"] == {"head": pytest.approx(0.65), "tail": None, "few": None}


def test_an_empty_test_set_is_refused():
    with pytest.raises(ValueError, match="no test image"):
        metrics_from_confusion(np.zeros((2, 2), int), {})


def test_all_groups_are_there():
    assert list(class_groups(np.array([200, 50, 3]))) == ["many", "medium", "few", "head", "middle", "tail"]


def test_predictions_use_running_statistics_and_keep_order(images):
    model, batches = resnet8(3, width=4), Batches(images)
    whole = predict(model, batches)
    assert torch.equal(predict(model, batches, torch.tensor([7, 2])), whole[[7, 2]])
    logits = model.eval()(batches.plain(torch.arange(len(images))))
    assert torch.equal(whole, logits.argmax(1))


def test_a_model_that_knows_other_classes_is_refused(images):
    model = resnet8(3, width=4)
    unnamed = evaluate_model(model, images, images.class_counts())
    model.names = images.names
    assert evaluate_model(model, images, images.class_counts()) == unnamed
    model.names = images.names[::-1]
    with pytest.raises(ValueError, match="the model must have the same class names in the same order"):
        evaluate_model(model, images, images.class_counts())
