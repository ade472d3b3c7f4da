import numpy as np
import torch
from torchvision.transforms import v2

from mllmfl_lite.data.batches import CHANNEL_MEAN, CHANNEL_STD, Batches


def reference(images: np.ndarray) -> torch.Tensor:
    """torchvision's own way from bytes to a normalised batch."""
    pixels = v2.functional.to_dtype(torch.from_numpy(images).permute(0, 3, 1, 2), torch.float32, scale=True)
    return v2.functional.normalize(pixels, list(CHANNEL_MEAN), list(CHANNEL_STD))


def test_plain_batches_are_torchvisions_normalised_images(images):
    batch = Batches(images).plain(torch.tensor([3, 0, 3]))
    torch.testing.assert_close(batch, reference(images.images[[3, 0, 3]]), rtol=1e-5, atol=1e-5)
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_each_augmented_image_is_a_padded_crop_maybe_flipped(images):
    batch = Batches(images, padding=2).augmented(torch.arange(20), torch.Generator().manual_seed(0))
    padded = reference(np.pad(images.images[:20], ((0, 0), (2, 2), (2, 2), (0, 0))))
    found = []
    for i in range(20):
        crops = {(dy, dx, flip): (c.flip(2) if flip else c)
                 for dy in range(5) for dx in range(5) for flip in (0, 1)
                 for c in [padded[i, :, dy : dy + 8, dx : dx + 8]]}  # fmt: skip
        found.append([key for key, crop in crops.items() if torch.allclose(crop, batch[i], atol=1e-5)])
    assert all(len(keys) == 1 for keys in found)
    assert len({keys[0] for keys in found}) > 10  # each image its own crop and coin


def test_crops_and_flips_are_uniform(images):
    one = images.subset(np.zeros(4000, int))
    batch = Batches(one, padding=1).augmented(torch.arange(4000), torch.Generator().manual_seed(0))
    _, counts = np.unique(batch.flatten(1).numpy(), axis=0, return_counts=True)
    assert len(counts) == 18  # 3 x 3 corners, 2 orientations
    assert counts.min() > 4000 / 18 * 0.7 and counts.max() < 4000 / 18 * 1.3


def test_batches_depend_on_the_generator_alone(images):
    batches, indices = Batches(images), torch.arange(10)
    first, again = (batches.augmented(indices, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, again)


def test_a_stream_is_the_batches_one_by_one(images):
    batches, parts = Batches(images), torch.arange(20).split(8)
    one_by_one = [batches.augmented(part, g) for g in [torch.Generator().manual_seed(5)] for part in parts]
    streamed = list(batches.stream(iter(parts), torch.Generator().manual_seed(5)))
    assert all(torch.equal(a, b) for a, b in zip(one_by_one, streamed, strict=True))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in streamed)
    assert list(batches.stream([], torch.Generator())) == []


def test_without_padding_nothing_is_cropped(images):
    batch = Batches(images, padding=0).augmented(torch.arange(6), torch.Generator().manual_seed(0))
    plain = reference(images.images[:6])
    assert all(
        torch.allclose(b, p, atol=1e-5) or torch.allclose(b, p.flip(2), atol=1e-5)
        for b, p in zip(batch, plain, strict=True)
    )
