"""Truths about the network: who sees whom, what the actions reach, and what a checkpoint holds."""
import pytest
import torch

from cache import KVCache
from diffusion import Diffusion
from machine import autocast, cast_weights
from model import INJECTIONS, SIZES, NanoWM, NanoWMConfig, rope_angles, rope_tables, rotate

TINY = dict(input_size=(8, 12), patch_size=2, in_channels=3, hidden_size=32, depth=4, num_heads=2, num_frames=4,
            action_dim=3)


def tiny(randomise=True, **options):
    torch.manual_seed(0)
    model = NanoWM(NanoWMConfig(**{**TINY, **options})).eval()
    if randomise:  # the zero-initialised layers would hide everything
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
    return model


def inputs(frames=4):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(2, frames, 3, 8, 12, generator=g), torch.randint(0, 1000, (2, frames), generator=g),
            torch.randn(2, frames, 3, generator=g))


@pytest.mark.parametrize('size, injection, millions', [
    ('S', 'additive', 39.78), ('B', 'additive', 158.60), ('B', 'adaln_fuse', 158.60), ('B', 'film', 172.77),
    ('B', 'cross_attention', 186.96), ('B', 'adaln', 201.12), ('L', 'additive', 558.67)])
def test_parameter_counts_equal_the_paper_sizes(size, injection, millions):
    with torch.device('meta'):
        model = NanoWM(NanoWMConfig(**SIZES[size], injection=injection))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize('injection', INJECTIONS)
def test_changing_frame_3_and_its_action_never_changes_frames_before(injection):
    model, (x, t, a) = tiny(injection=injection), inputs()
    x2, t2, a2 = x.clone(), t.clone(), a.clone()
    x2[:, 3], t2[:, 3], a2[:, 2:] = 0, 5, 9  # action 2 leads to frame 3
    with torch.no_grad():
        before, after = model(x, t, a), model(x2, t2, a2)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3], after[:, 3])


def test_without_causality_the_past_sees_the_future():
    model, (x, t, a) = tiny(causal=False), inputs()
    x2 = x.clone()
    x2[:, 3] = 0
    with torch.no_grad():
        assert not torch.allclose(model(x, t, a)[:, 0], model(x2, t, a)[:, 0])


@pytest.mark.parametrize('injection', INJECTIONS)
def test_frame_0_depends_on_no_action(injection):
    model, (x, t, a) = tiny(injection=injection), inputs()
    with torch.no_grad():
        right, wrong = model(x, t, a), model(x, t, a + 1)
    assert torch.equal(right[:, 0], wrong[:, 0])
    assert all(not torch.allclose(right[:, f], wrong[:, f]) for f in (1, 2, 3))


def test_a_shorter_clip_is_the_start_of_a_longer_one():
    model, (x, t, a) = tiny(), inputs()
    with torch.no_grad():
        assert torch.allclose(model(x[:, :2], t[:, :2], a[:, :2]), model(x, t, a)[:, :2], atol=1e-5)


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('injection', INJECTIONS)
def test_actions_beyond_the_clip_are_not_heard(injection, causal):
    model, (x, t, a) = tiny(injection=injection, causal=causal), inputs()
    with torch.no_grad():
        assert torch.allclose(model(x[:, :2], t[:, :2], a), model(x[:, :2], t[:, :2], a[:, :2]), atol=1e-5)


def test_no_action_is_a_zero_embedding():
    model, (x, t, _) = tiny(), inputs()
    with torch.no_grad():
        assert model(x, t).shape == x.shape
        assert tiny(action_dim=0)(x, t, None).shape == x.shape


@pytest.mark.parametrize('injection', INJECTIONS)
def test_every_injection_learns_and_listens(injection):
    """In a world where the next frame is as bright as the action: every action parameter gets a gradient."""
    model = tiny(randomise=False, injection=injection, action_dim=1, depth=2, num_frames=3).train()
    diffusion = Diffusion('x')
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    g = torch.Generator().manual_seed(0)
    t = torch.full((32, 3), 999)

    def world():
        action = torch.rand(32, 3, 1, generator=g) * 2 - 1
        x0 = torch.cat([torch.zeros(32, 1, 1), action[:, :-1]], dim=1)[..., None, None].expand(-1, -1, 3, 8, 12)
        return x0, action, torch.randn(x0.shape, generator=g)

    for _ in range(60):
        x0, action, noise = world()
        optimizer.zero_grad()
        diffusion.loss(model, x0, action, t, noise).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        grad = p.grad
        if not any(part in name for part in ('action', 'film', 'cross')):
            continue
        if 'blocks.0.cross_attn.q.' in name:
            assert not p.requires_grad  # a spatial block's query faces one action only
            continue
        if 'cross_attn.kv' in name:  # the same holds for its key; and a bias shared by all keys moves no softmax
            grad = grad[32:] if 'blocks.0' in name or 'bias' in name else grad
        assert (grad != 0).float().mean() > 0.99, name
    with torch.no_grad():
        x0, action, noise = world()
        right = diffusion.loss(model, x0, action, t, noise)
        wrong = diffusion.loss(model, x0, action.roll(1, 0), t, noise)
    assert right < 0.5 * wrong


@pytest.mark.parametrize('injection', INJECTIONS)
def test_the_output_is_zero_at_initialisation(injection):
    model, (x, t, a) = tiny(randomise=False, injection=injection), inputs()
    with torch.no_grad():
        assert (model(x, t, a) == 0).all()


def test_rotary_attention_depends_on_distances_only():
    q, k = torch.randn(2, 1, 16)
    cos, sin = rope_tables(rope_angles(torch.arange(20), 8))
    scores = rotate(q.expand(20, -1), cos, sin) @ rotate(k.expand(20, -1), cos, sin).T
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand(len(diagonal)), atol=1e-4)


def test_rotation_changes_no_length():
    x = torch.randn(20, 16)
    cos, sin = rope_tables(rope_angles(torch.arange(20), 8))
    assert torch.allclose(rotate(x, cos, sin).norm(dim=1), x.norm(dim=1), atol=1e-5)


def test_the_double_zero_of_the_reference_gives_no_action_parameter_a_gradient():
    model, (x, t, a) = tiny(randomise=False, injection='cross_attention', zero_cross_gate=True), inputs()
    torch.nn.init.normal_(model.final_layer.linear.weight)
    model(x, t, a).square().mean().backward()
    for name, p in model.named_parameters():
        if 'action' in name or 'cross' in name:
            assert p.grad is None or not p.grad.any(), name


def test_a_temporal_block_leaves_in_the_cache_what_attention_over_all_frames_would_use():
    model, (x, t, a) = tiny(), inputs()
    whole, parts = ([KVCache(4) if b.temporal else None for b in model.blocks] for _ in range(2))
    with torch.no_grad():
        model(x, t, a, cache=whole, places=torch.arange(4))
        assert model(x[:, :3], t[:, :3], a, cache=parts, places=torch.arange(3), skip=3) is None
        model(x[:, 3:], t[:, 3:], a, cache=parts, places=torch.tensor([3]))
    for one, other in zip(whole[1::2], parts[1::2], strict=True):
        assert torch.allclose(one.k, other.k, atol=1e-5) and torch.allclose(one.v, other.v, atol=1e-5)


@pytest.mark.parametrize('injection', INJECTIONS)
def test_weights_cast_once_give_what_autocast_gives(injection):
    model = tiny(injection=injection)
    with torch.no_grad(), autocast('cpu', 'bf16'):
        before = model(*inputs())
        cast_weights(model, 'bf16')
        assert torch.equal(model(*inputs()), before)
