"""Pictures: what a grid shows, pixel by pixel."""

import numpy as np
import pytest

from diffusion.evaluation.pictures import GAP, LABEL_WIDTH, class_grid


@pytest.mark.parametrize(("size", "square"), [(16, 6), (32, 3), (64, 2)])
def test_each_pixel_of_a_sample_is_a_square_of_the_grid(size: int, square: int) -> None:
    rows = ["Forest", "River"]
    samples = np.random.default_rng(0).integers(0, 256, (6, size, size, 3), dtype=np.uint8)
    grid = np.array(class_grid(samples, rows))
    cell = size * square
    for index, sample in enumerate(samples):
        row, column = index % len(rows), index // len(rows)
        top, left = GAP + row * (cell + GAP), LABEL_WIDTH + GAP + column * (cell + GAP)
        shown = grid[top : top + cell, left : left + cell].reshape(size, square, size, square, 3)
        np.testing.assert_array_equal(shown, np.broadcast_to(sample[:, None, :, None], shown.shape))
