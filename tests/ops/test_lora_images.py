"""lora_images: parameters land in their places, times their factors, and nothing else is touched."""

import torch

from minitune.ops.lora_images import Images


def test_parameters_land_in_their_places():
    for dtype in (torch.float32, torch.bfloat16):
        flat = torch.full((40,), 7.0, dtype=dtype)
        whole = flat[4:34].view(5, 6)
        first, second = torch.randn(2, 6), torch.randn(3, 2)
        Images().refresh(flat, [(whole[:2], first, 1.0), (whole[2:, 3:5], second, 0.5)])
        assert torch.equal(whole[:2], first.to(dtype)) and torch.equal(whole[2:, 3:5], (second * 0.5).to(dtype))
        whole[:2], whole[2:, 3:5] = 7, 7
        assert bool((flat == 7).all())


def test_nothing_to_copy():
    Images().refresh(torch.empty(0), [])
