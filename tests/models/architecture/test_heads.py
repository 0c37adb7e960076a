"""Heads: the order of rows inside a token, for every backbone."""

import pytest
import torch

from lakonlab.models.architecture.heads import (
    ROW_ORDERS,
    GridHead,
    MixtureHead,
    first_copy_only,
    fold_tokens,
    repeat_rows,
    spread_noise,
)
from lakonlab.ops.patchify import patchify
from lakonlab.ops.random_source import RecordedSource

B, K, C, P, H, W = 2, 3, 4, 2, 4, 6
GRID = (H // P, W // P)


def tokens_of(images: torch.Tensor, row_order: str) -> torch.Tensor:
    """Tokens (B, L, K * C * P * P) of images (B, K, C, H, W), written out element by element."""
    tokens = torch.empty(B, GRID[0] * GRID[1], K * C * P * P)
    for row in range(H):
        for column in range(W):
            token = row // P * GRID[1] + column // P
            p, q = row % P, column % P
            for k in range(K):
                for c in range(C):
                    if row_order == 'patch_major':
                        index = ((p * P + q) * K + k) * C + c
                    else:
                        index = ((k * C + c) * P + p) * P + q
                    tokens[:, token, index] = images[:, k, c, row, column]
    return tokens


@pytest.mark.parametrize('row_order', ROW_ORDERS)
def test_fold_tokens(row_order):
    images = torch.randn(B, K, C, H, W)
    assert torch.equal(fold_tokens(tokens_of(images, row_order), GRID, P, K, row_order), images)


def test_channel_major_is_the_order_of_patchified_latents():
    images = torch.randn(B, C, H, W)
    tokens = patchify(images, P).flatten(2).transpose(1, 2)
    assert torch.equal(fold_tokens(tokens, GRID, P, 1, 'channel_major').squeeze(1), images)


@pytest.mark.parametrize('row_order', ROW_ORDERS)
def test_copies_of_an_output_layer_predict_the_same(row_order):
    weight, features = torch.randn(C * P * P, 8), torch.randn(B, GRID[0] * GRID[1], 8)
    expected = fold_tokens(features @ weight.T, GRID, P, 1, row_order)
    for widen, is_kept in ((repeat_rows, [1, 1, 1]), (first_copy_only, [1, 0, 0])):
        found = fold_tokens(features @ widen(weight, K, P, row_order).T, GRID, P, K, row_order)
        for k, kept in enumerate(is_kept):
            torch.testing.assert_close(found[:, k], kept * expected[:, 0])


@pytest.mark.parametrize('row_order', ROW_ORDERS)
def test_noise_is_constant_over_the_image(row_order):
    noise = torch.randn(K * C)
    tokens = spread_noise(noise, P, row_order).expand(B, GRID[0] * GRID[1], -1)
    found = fold_tokens(tokens, GRID, P, K, row_order)
    assert torch.equal(found, noise.view(1, K, C, 1, 1).expand_as(found))


@pytest.mark.parametrize('row_order', ROW_ORDERS)
def test_a_students_own_weights_are_left_alone(row_order):
    head = MixtureHead(K, C, P, row_order)
    layers = torch.nn.ModuleDict(head.layers(8, 8, 4, 2))
    state = layers.state_dict()
    found = head.from_output_layer(state, state, 'proj_out', RecordedSource({}))
    assert all(torch.equal(found[name], state[name]) for name in state)
    grid = GridHead(K, P, row_order)
    state = {'proj_out.weight': torch.randn(K * C * P * P, 8)}
    found = grid.from_output_layer(state, 'proj_out', K * C * P * P)
    assert torch.equal(found['proj_out.weight'], state['proj_out.weight'])
