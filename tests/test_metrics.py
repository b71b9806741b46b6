"""Truths about the metrics; networks with random weights stand in for the judges."""
import os

import numpy as np
import pytest
import torch

from metrics import MAX_PSNR, WEIGHTS, chunked, frechet, interval, load_networks, psnr, ssim

LEVELS = (0, 0.05, 0.2, 0.8)  # of noise
NOISE = torch.Generator().manual_seed(0)
FRAMES = torch.rand(2, 3, 3, 64, 64, generator=NOISE)  # [B,F,C,H,W] in [0, 1]
FRAMES = torch.nn.functional.avg_pool2d(FRAMES.flatten(0, 1), 5, 1, 2).unflatten(0, (2, 3))
SMALL = FRAMES[:, :2, :, :32, :32]
CLIPS = torch.rand(8, 12, 3, 16, 16, generator=NOISE).cumsum(dim=1) / 12


def noisy(x, level):
    return (x + level * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)


class I3D(torch.nn.Module):
    """Takes what I3D takes."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv3d(3, 6, (4, 56, 56), stride=(3, 56, 56))

    def forward(self, x, rescale: bool = True, resize: bool = True, return_features: bool = False):
        assert not rescale and resize and return_features and x.shape[3:] == (224, 224)
        return self.conv(x).relu().mean((3, 4)).flatten(1)


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    """A folder with pretrained/ for LPIPS on AlexNet, FID and FVD, entered; skips without the libraries."""
    fidelity = pytest.importorskip('torch_fidelity')
    torchvision = pytest.importorskip('torchvision')
    pytest.importorskip('lpips')
    torch.manual_seed(0)
    root, before = tmp_path_factory.mktemp('judges'), os.getcwd()
    (root / 'pretrained' / 'i3d').mkdir(parents=True)
    path = {name: str(root / 'pretrained' / file) for name, (file, _) in WEIGHTS.items()}
    torch.save(torchvision.models.alexnet().state_dict(), path['alex'])
    torch.save({}, path['inception'])
    with pytest.MonkeyPatch.context() as patch:  # the library gives the network only with weights
        patch.setattr(torch.nn.Module, 'load_state_dict', lambda *args, **options: None)
        network = fidelity.FeatureExtractorInceptionV3(
            '', ['2048'], feature_extractor_weights_path=path['inception'])
    torch.save(network.state_dict(), path['inception'])
    torch.jit.script(I3D()).save(path['i3d'])
    os.chdir(root)
    yield path
    os.chdir(before)


@pytest.fixture(scope='module')
def networks(pretrained):
    found, absent = load_networks(('lpips', 'fid', 'fvd'), 'cpu', (64, 64), 12, 'alex')
    assert not absent
    return found


def test_psnr_and_ssim_equal_scikit_image():
    of = pytest.importorskip('skimage.metrics')
    a = FRAMES[..., :20, :24]  # not square
    b = noisy(a, 0.1)
    for i in range(2):
        for f in range(3):
            x, y = a[i, f].numpy(), b[i, f].numpy()
            assert abs(psnr(a, b)[i, f] - of.peak_signal_noise_ratio(x, y, data_range=1)) < 1e-4
            want = of.structural_similarity(x, y, data_range=1, channel_axis=0, gaussian_weights=True,
                                            sigma=1.5, use_sample_covariance=False)
            assert abs(ssim(a, b)[i, f] - want) < 1e-4


def test_equal_frames_score_the_most_there_is():
    assert (psnr(FRAMES, FRAMES) == MAX_PSNR).all()
    assert torch.allclose(ssim(FRAMES, FRAMES), torch.ones(2, 3))


@torch.no_grad()
def test_lpips_equals_its_library(networks, pretrained):
    import lpips
    library = lpips.LPIPS(net='alex', pnet_rand=True, verbose=False)
    layers = torch.load(pretrained['alex'])
    for name, p in library.net.named_parameters():
        p.copy_(layers[f'features.{name.split(".", 1)[1]}'])
    b = noisy(FRAMES, 0.1)
    want = library(FRAMES.flatten(0, 1) * 2 - 1, b.flatten(0, 1) * 2 - 1)
    got = networks['lpips'](FRAMES, b)
    assert got.shape == (2, 3)
    assert torch.allclose(got.flatten(), want.flatten())


def test_fid_features_equal_their_librarys(networks, pretrained):
    from torch_fidelity import FeatureExtractorInceptionV3
    inception = FeatureExtractorInceptionV3(
        '', ['2048'], feature_extractor_weights_path=pretrained['inception'])
    want, = inception((SMALL * 255).round().byte().flatten(0, 1))
    assert torch.allclose(networks['fid'](SMALL).flatten(0, 1), want, atol=1e-4)


def test_fvd_features_are_those_of_whole_clips(networks, pretrained):
    i3d = torch.jit.load(pretrained['i3d'])
    x = torch.nn.functional.interpolate(CLIPS.flatten(0, 1) * 2 - 1, (224, 224), mode='bilinear')
    x = x.unflatten(0, (8, 12)).transpose(1, 2)
    want = i3d(x, rescale=False, resize=True, return_features=True)
    assert torch.allclose(networks['fvd'](CLIPS)[:, 0], want, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('name', ['psnr', 'ssim', 'lpips', 'fid', 'fvd'])
def test_more_noise_never_scores_better(name, networks):
    if name in ('psnr', 'ssim'):
        metric = {'psnr': psnr, 'ssim': ssim}[name]
        scores = [-metric(FRAMES, noisy(FRAMES, level)).mean().item() for level in LEVELS]
    elif name == 'lpips':
        scores = [networks['lpips'](FRAMES, noisy(FRAMES, level)).mean().item() for level in LEVELS]
    else:
        x = {'fid': SMALL, 'fvd': CLIPS}[name]
        features = [networks[name](noisy(x, level)).flatten(0, 1) for level in LEVELS]
        scores = [frechet(f, features[0]) for f in features]
        assert abs(scores[0]) < 1e-3  # of a set with itself
    assert scores == sorted(scores) and scores[-1] > scores[0]


@pytest.mark.parametrize('n', [5, 50])
def test_frechet_distance_is_the_formulas_with_fewer_or_more_samples_than_features(n):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(n, 8, generator=g).double()
    b = torch.randn(n + 3, 8, generator=g).double() * 2 + 1
    A, B = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()
    want = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * root
    assert abs(frechet(a, b) - want.item()) < 1e-5
    assert abs(frechet(a, a)) < 1e-9


def test_frechet_distance_equals_torch_fidelitys():
    metric_fid = pytest.importorskip('torch_fidelity').metric_fid
    g = torch.Generator().manual_seed(0)
    a = torch.randn(40, 12, generator=g)
    b = torch.randn(30, 12, generator=g) @ torch.randn(12, 12, generator=g) + 1
    of_a, of_b = metric_fid.fid_features_to_statistics(a), metric_fid.fid_features_to_statistics(b)
    want, = metric_fid.fid_statistics_to_metric(of_a, of_b, False).values()
    assert abs(frechet(a, b) - want) < 1e-3 * want


@pytest.mark.parametrize('name, file', [
    ('lpips', 'vgg16'), ('fid', 'weights-inception'), ('fvd', 'i3d/i3d_torchscript.pt')])
def test_what_is_absent_is_named_with_the_command_that_fetches_it(name, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    networks, absent = load_networks((name,), 'cpu', (16, 16), 12)
    assert not networks
    cures = "pip install -e '.[eval]'", f'curl -L --create-dirs -o pretrained/{file}'
    assert any(cure in absent[name] for cure in cures)


def test_fvd_of_short_clips_is_absent():
    assert 'needs 10 predicted frames and here are 3' in load_networks(('fvd',), 'cpu', (16, 16), 3)[1]['fvd']


def test_networks_see_frames_in_chunks_and_clips_keep_their_order():
    seen = chunked(lambda x: x.mean((1, 2, 3)), FRAMES, size=4)
    assert torch.equal(seen, FRAMES.mean((2, 3, 4)))


def test_intervals_hold_the_mean_and_shrink_with_more_clips():
    rng = np.random.default_rng(0)
    low, high = interval(rng.normal(size=400))
    wider_low, wider_high = interval(rng.normal(size=25))
    assert low < 0.1 and high > -0.1 and 0.15 < high - low < 0.25
    assert wider_high - wider_low > 2 * (high - low)
