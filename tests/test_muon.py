"""Truths about Muon."""
import torch

from muon import Muon, orthogonal

SHAPES = [(48, 16), (16, 48), (16, 16), (48, 16)]


def weights_after(optimizer, **options):
    """Matrices after four steps on gradients that are the same for any optimizer."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = optimizer(weights, lr=1e-2, weight_decay=0.1, **options)
    for _ in range(4):
        for p in weights:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return weights


def test_all_of_a_shape_at_once_are_what_torch_does_one_by_one():
    ours = weights_after(Muon)
    theirs = weights_after(torch.optim.Muon, adjust_lr_fn='match_rms_adamw')
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-4)  # of steps of 0.002: bf16 has two or three digits


def test_an_update_keeps_its_directions_and_takes_them_equally_far():
    x = torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    turned = u.mT @ orthogonal(x).float() @ vh.mT
    sizes = turned.diagonal(dim1=1, dim2=2)
    assert sizes.min() > 0.6
    assert sizes.max() < 1.3
    torch.testing.assert_close(turned, torch.diag_embed(sizes), rtol=0, atol=0.05)


def test_a_matrix_without_a_gradient_is_left_alone():
    used, unused = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    optimizer = Muon([used, unused], lr=0.1, weight_decay=0.1)
    used.grad = torch.eye(4)
    optimizer.step()
    assert not torch.equal(used, torch.ones(4, 4))
    assert torch.equal(unused, torch.ones(4, 4))
