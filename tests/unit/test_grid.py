"""Grids of images: where each image stands, and what is written above it."""

import numpy as np
import pytest
import torch
from p2p.drawing.grid import GAP, comparison_grid, contact_sheet
from p2p.drawing.heatmap import colour, coverage, heatmaps
from PIL import Image


def solid(count, height=32, width=48):
    """Images of one colour each, red from 0.1 up; letters and paper are grey."""
    images = torch.zeros(count, height, width, 3)
    images[..., 0] = (torch.arange(1, count + 1) / 10)[:, None, None]
    return images


def grid_of(images, labels="", columns=2):
    return comparison_grid(images, labels.splitlines(), columns)


def place_of(grid, value):
    """Rows and columns that the image of this red covers."""
    where = (grid[0] - torch.tensor([value, 0, 0])).abs().amax(-1) < 1e-6
    return where.any(1).nonzero().flatten(), where.any(0).nonzero().flatten()


@pytest.mark.parametrize("labelled", ["none", "columns", "each"])
@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (1, 4), (2, 2), (3, 2), (4, 2), (5, 3), (3, 1), (7, 4), (2, 5)]
)
def test_images_stand_in_columns_row_by_row_also_when_the_last_row_is_short(count, columns, labelled):
    used = min(count, columns)
    number = {"none": 0, "columns": used, "each": count}[labelled]
    grid = grid_of(solid(count), "\n".join(f"label {n}" for n in range(number)), columns)
    assert grid.ndim == 4 and grid.shape[0] == 1 and grid.shape[3] == 3 and grid.dtype == torch.float32
    assert grid.min() >= 0 and grid.max() <= 1
    places = [place_of(grid, (n + 1) / 10) for n in range(count)]
    for n, (rows, across) in enumerate(places):
        assert (len(rows), len(across)) == (32, 48)
        if n % used:
            assert across[0] > places[n - 1][1][-1] and torch.equal(rows, places[n - 1][0])
        elif n:
            assert rows[0] > places[n - 1][0][-1] and torch.equal(across, places[0][1])


def test_labels_are_written_above_their_images():
    plain, labelled = grid_of(solid(3)), grid_of(solid(3), "one\ntwo\nthree")
    assert labelled.shape[1] > plain.shape[1] and labelled.shape[2] == plain.shape[2]
    for value in (0.1, 0.2, 0.3):
        rows, across = place_of(labelled, value)
        head = labelled[0, max(int(rows[0]) - 12, 0) : int(rows[0]), across]
        assert (head < 0.5).any()  # letters


def test_a_label_per_column_stands_over_the_first_row_only():
    grid = grid_of(solid(4), "left\nright")
    first, second = place_of(grid, 0.1)[0], place_of(grid, 0.3)[0]
    assert (grid[0, : int(first[0])] < 0.5).any()
    assert not (grid[0, int(first[-1]) + 1 : int(second[0])] < 0.5).any()


def test_an_empty_line_labels_nothing():
    grid = grid_of(solid(2), "\nright")
    rows, across = place_of(grid, 0.1)
    assert (grid[0, : int(rows[0]), across] == 1).all()


def test_a_long_label_is_wrapped_and_widens_nothing():
    plain, labelled = (
        grid_of(solid(2)),
        grid_of(solid(2), "\n".join(["a very long label of many words " * 3] * 2)),
    )
    assert labelled.shape[2] == plain.shape[2] and labelled.shape[1] > plain.shape[1] + 30


@pytest.mark.parametrize("labels", ["one", "one\ntwo\nthree"])
def test_another_number_of_labels_is_an_error_that_says_the_numbers(labels):
    with pytest.raises(ValueError, match=f"{len(labels.splitlines())} labels for 4 images in 2 columns"):
        grid_of(solid(4), labels)


def test_the_grid_leaves_the_images_that_it_was_given():
    images = solid(3)
    before = images.clone()
    grid_of(images, "a\nb\nc")
    assert torch.equal(images, before)


def test_transparency_is_left_out():
    assert grid_of(torch.rand(2, 8, 8, 4)).shape[3] == 3


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (1, 4), (2, 2), (3, 1), (3, 2), (4, 2), (5, 3), (7, 4)]
)
def test_the_gaps_between_images_and_around_them_are_equal(count, columns):
    images, used = torch.rand(count, 10, 6, 3), min(count, columns)
    expected = torch.ones(-(-count // used) * (10 + GAP) + GAP, used * (6 + GAP) + GAP, 3)
    for n, image in enumerate(images):
        top, left = n // used * (10 + GAP) + GAP, n % used * (6 + GAP) + GAP
        expected[top : top + 10, left : left + 6] = image
    assert torch.equal(grid_of(images, columns=columns)[0], expected)


def test_a_contact_sheet_fits_images_of_several_sizes_to_the_largest():
    images = [Image.new("RGB", size, "red") for size in ((20, 10), (10, 10), (5, 5))]
    sheet = np.asarray(contact_sheet(images, [], 2))
    assert sheet.shape == (2 * 10 + 3 * GAP, 2 * 20 + 3 * GAP, 3)
    red = (sheet == [255, 0, 0]).all(-1)
    assert red[GAP : GAP + 10, GAP : GAP + 20].all()
    assert red[GAP : GAP + 10, 2 * GAP + 20 :].sum() == red[2 * GAP + 10 :].sum() == 100
    assert (sheet[~red] == 255).all()


def test_heat_maps_of_a_pair_share_one_scale_and_lie_over_its_image():
    maps = torch.rand(2, 3, 8, 8) * torch.tensor([1.0, 0.1])[:, None, None, None]
    plain = heatmaps(maps, ["a", "b", "c"])[:, -8:]
    for pair in range(2):
        for word in range(3):
            expected = colour(maps[pair, word] / maps[pair].max())
            torch.testing.assert_close(plain[3 * pair + word], expected)
    under = torch.rand(2, 8, 8, 4)
    over = heatmaps(maps, ["a", "b", "c"], under)[:, -8:]
    mixed = 0.6 * plain + 0.4 * under[..., :3].repeat_interleave(3, 0)
    torch.testing.assert_close(over, mixed)


def test_colours_grow_lighter_with_the_value():
    light = colour(torch.linspace(0, 1, 41)) @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert (light.diff() > 0).all()
    assert torch.equal(colour(torch.tensor([-0.5, 1.5])), colour(torch.tensor([0.0, 1.0])))


def test_words_cover_where_one_of_them_is_near_its_own_maximum():
    maps = torch.tensor([[[[4.0, 1.0]], [[0.0, 0.02]]]])
    assert coverage(maps).tolist() == [[[1.0, 1.0]]]
    assert coverage(maps[:, :1]).tolist() == [[[1.0, 0.25]]]
    assert not coverage(torch.zeros(1, 2, 1, 2)).any()
