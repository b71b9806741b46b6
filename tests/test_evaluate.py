"""Truths about the metrics, evaluate.py and ablate.py; networks with random weights stand in for the judges."""
import json
import os
import subprocess

import numpy as np
import pytest
import torch
from conftest import TRAIN, error, inline, run

from checkpoint import read_checkpoint
from evaluate import (
    MAX_PSNR,
    WEIGHTS,
    chunked,
    evaluate,
    frechet,
    interval,
    load_networks,
    psnr,
    ssim,
    summarise,
    table,
)
from sample import held_out, load_run

FRAMES = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0))  # [B,F,C,H,W] in [0, 1]
FRAMES = torch.nn.functional.avg_pool2d(FRAMES.flatten(0, 1), 5, 1, 2).unflatten(0, (2, 3))


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
    """A folder with pretrained/ for LPIPS on AlexNet, FID and FVD, entered; skips if the libraries are not there."""
    fidelity, torchvision = pytest.importorskip('torch_fidelity'), pytest.importorskip('torchvision')
    pytest.importorskip('lpips')
    torch.manual_seed(0)
    root, before = tmp_path_factory.mktemp('judges'), os.getcwd()
    (root / 'pretrained' / 'i3d').mkdir(parents=True)
    path = {name: str(root / 'pretrained' / file) for name, (file, _) in WEIGHTS.items()}
    torch.save(torchvision.models.alexnet().state_dict(), path['alex'])
    torch.save({}, path['inception'])
    with pytest.MonkeyPatch.context() as patch:  # the library gives the network only with weights
        patch.setattr(torch.nn.Module, 'load_state_dict', lambda *args, **options: None)
        network = fidelity.FeatureExtractorInceptionV3('', ['2048'], feature_extractor_weights_path=path['inception'])
    torch.save(network.state_dict(), path['inception'])
    torch.jit.script(I3D()).save(path['i3d'])
    os.chdir(root)
    yield path
    os.chdir(before)


def test_psnr_and_ssim_equal_scikit_image():
    of = pytest.importorskip('skimage.metrics')
    a = FRAMES[..., :20, :24]  # not square
    b = noisy(a, 0.1)
    for x, y, p, s in zip(a.flatten(0, 1).numpy(), b.flatten(0, 1).numpy(), psnr(a, b).flatten(), ssim(a, b).flatten(),
                          strict=True):
        assert abs(p - of.peak_signal_noise_ratio(x, y, data_range=1)) < 1e-4
        assert abs(s - of.structural_similarity(x, y, data_range=1, channel_axis=0, gaussian_weights=True, sigma=1.5,
                                                use_sample_covariance=False)) < 1e-4
    assert (psnr(a, a) == MAX_PSNR).all() and torch.allclose(ssim(a, a), torch.ones(2, 3))


def test_lpips_fid_and_fvd_equal_their_libraries_and_more_noise_never_scores_better(pretrained):
    import lpips
    from torch_fidelity import FeatureExtractorInceptionV3, metric_fid
    networks, absent = load_networks(('lpips', 'fid', 'fvd'), 'cpu', (64, 64), 12, 'alex')
    assert not absent and networks.keys() == {'lpips', 'fid', 'fvd'}
    b = noisy(FRAMES, 0.1)
    with torch.no_grad():
        want = lpips.LPIPS(net='alex', pnet_rand=True, verbose=False)
        layers = {k.removeprefix('features.'): v for k, v in torch.load(pretrained['alex']).items()}
        for name, p in want.net.named_parameters():
            p.copy_(layers[name.split('.', 1)[1]])
        got = networks['lpips'](FRAMES, b)
        assert got.shape == (2, 3)
        assert torch.allclose(got.flatten(), want(FRAMES.flatten(0, 1) * 2 - 1, b.flatten(0, 1) * 2 - 1).flatten())

        inception = FeatureExtractorInceptionV3('', ['2048'], feature_extractor_weights_path=pretrained['inception'])
        small = FRAMES[:, :2, :, :32, :32]
        features = networks['fid'](small)
        want, = inception((small * 255).round().byte().flatten(0, 1))
        assert torch.allclose(features.flatten(0, 1), want, atol=1e-4)

        clips = torch.rand(8, 12, 3, 16, 16).cumsum(dim=1) / 12
        i3d = torch.jit.load(pretrained['i3d'])
        x = torch.nn.functional.interpolate(clips.flatten(0, 1) * 2 - 1, (224, 224), mode='bilinear')
        want = i3d(x.unflatten(0, (8, 12)).transpose(1, 2), rescale=False, resize=True, return_features=True)
        assert torch.allclose(networks['fvd'](clips)[:, 0], want, atol=1e-5)

        levels = (0, 0.05, 0.2, 0.8)
        worse = [[networks['lpips'](FRAMES, noisy(FRAMES, s)).mean().item() for s in levels],
                 [-psnr(FRAMES, noisy(FRAMES, s)).mean().item() for s in levels],
                 [-ssim(FRAMES, noisy(FRAMES, s)).mean().item() for s in levels],
                 [frechet(networks['fvd'](noisy(clips, s))[:, 0], want) for s in levels],
                 [frechet(networks['fid'](noisy(small, s)).flatten(0, 1), features.flatten(0, 1)) for s in levels]]
        for scores in worse:
            assert scores == sorted(scores) and scores[-1] > scores[0], worse
        assert abs(worse[3][0]) < 1e-3 and abs(worse[4][0]) < 1e-3  # of a set with itself

        a, b = torch.randn(40, 12), torch.randn(30, 12) @ torch.randn(12, 12) + 1
        want, = metric_fid.fid_statistics_to_metric(*map(metric_fid.fid_features_to_statistics, (a, b)), False).values()
        assert abs(frechet(a, b) - want) < 1e-3 * want


def test_frechet_distance_is_that_of_the_formula_with_more_or_fewer_samples_than_features():
    g = torch.Generator().manual_seed(0)
    for n in (5, 50):
        a, b = torch.randn(n, 8, generator=g).double(), torch.randn(n + 3, 8, generator=g).double() * 2 + 1
        A, B = torch.cov(a.T), torch.cov(b.T)
        root = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()
        want = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * root
        assert abs(frechet(a, b) - want.item()) < 1e-5 and abs(frechet(a, a)) < 1e-9


def test_what_is_absent_is_said_with_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    networks, absent = load_networks(('lpips', 'fid', 'fvd'), 'cpu', (16, 16), 12)
    assert not networks and absent['fvd'].startswith('curl -L --create-dirs -o pretrained/i3d/i3d_torchscript.pt')
    for name, file in (('lpips', 'vgg16'), ('fid', 'weights-inception')):
        cures = "pip install -e '.[eval]'", f'curl -L --create-dirs -o pretrained/{file}'
        assert any(cure in absent[name] for cure in cures)
    assert 'needs 10 predicted frames and here are 3' in load_networks(('fvd',), 'cpu', (16, 16), 3)[1]['fvd']


def test_networks_see_frames_in_chunks_and_clips_keep_their_order():
    assert torch.equal(chunked(lambda x: x.mean((1, 2, 3)), FRAMES, size=4), FRAMES.mean((2, 3, 4)))


def test_intervals_hold_the_mean_and_shrink_with_more_clips():
    rng = np.random.default_rng(0)
    (low, high), (few_low, few_high) = interval(rng.normal(size=400)), interval(rng.normal(size=25))
    assert low < 0.1 and high > -0.1 and 0.15 < high - low < 0.25 and few_high - few_low > 2 * (high - low)
    right, wrong = torch.rand(9, 3), torch.rand(9, 3)
    results = summarise({'psnr': right, 'wrong_psnr': wrong})
    assert abs(results['means']['gap_psnr'] - (right - wrong).mean()) < 1e-6
    low, high = results['intervals']['gap_psnr']
    assert low < results['means']['gap_psnr'] < high and len(results['per_clip']['psnr']) == 9


def figures(folder):
    with open(os.path.join(folder, 'metrics.json')) as f:
        metrics = json.load(f)
    assert metrics.pop('seconds') > 0
    return metrics


def test_one_seed_gives_one_result_and_batches_and_processes_do_not_matter(trained, tmp_path):
    options = ['evaluate.py', f'--ckpt={trained}', '--num_clips=5', '--device=cpu']
    printed = inline(*options)
    once = figures(trained)
    assert {'clips.png', 'metrics.png'} <= set(os.listdir(trained))
    with open(os.path.join(trained, 'metrics.md')) as f:
        assert f.read() in printed
    assert once['settings']['num_steps'] == 2 and len(once['per_frame']['psnr']) == 3 and len(once['clips']) == 5
    assert 'needs 10 predicted frames' in once['absent']['fvd'] and 'no FVD: ' in printed
    inline(*options)
    assert figures(trained) == once
    inline(*options, f'--out_dir={tmp_path}/batched', '--batch_size=2')
    run('-m', 'torch.distributed.run', '--nproc_per_node=2', *options, f'--out_dir={tmp_path}/two')
    for name in ('batched', 'two'):
        other = figures(tmp_path / name)
        assert other['clips'] == once['clips']
        for key, values in once['per_clip'].items():
            assert np.allclose(other['per_clip'][key], values, atol=1e-3 if 'psnr' in key else 1e-5), (name, key)
    assert "expected some of lpips,fid,fvd" in error(*options, '--metrics=psnr')
    assert "schedule='diagonal'" in error(*options, '--schedule=diagonal')


def test_evaluate_gives_the_distances_whose_network_is_there(trained):
    model, diffusion, cfg = load_run(trained, 'cpu')
    clips = held_out(model, cfg, 5)
    networks = {'fvd': lambda x: x.mean(dim=(3, 4)).flatten(1)[:, None]}  # colours over time
    results = summarise(evaluate(model, diffusion, clips, clips.fixed(20), 1, 1, networks=networks))
    assert results['means']['fvd'] > 0 and 'wrong_fvd' in results['means'] and 'fvd' not in results['intervals']
    assert '| FVD |' in table('run', results['means'], results['intervals'])


def test_training_logs_the_metrics(wall, tmp_path):
    inline(*TRAIN, f'--dataset={wall}', f'--out_dir={tmp_path}', '--max_steps=2', '--metrics_every=1')
    with open(tmp_path / 'log.jsonl') as f:
        logged = [line for line in map(json.loads, f) if 'gap_psnr' in line]
    assert [line['step'] for line in logged] == [1, 2] and {'psnr', 'ssim', 'wrong_ssim'} <= logged[0].keys()


def test_an_ablation_is_interrupted_resumed_and_skips_what_is_done(wall, tmp_path, monkeypatch):
    base, calls, interrupt = tmp_path / 'tiny.py', [], True
    values = dict(device='cpu', dataset=wall, patch_size=4, hidden_size=32, depth=2, num_heads=2, batch_size=4,
                  pred_name='x', num_val_clips=2, sample_steps=1, max_steps=4, warmup_steps=1, learning_rate=1e-2)
    base.write_text('\n'.join(f'{k} = {v!r}' for k, v in values.items()))

    def in_process(command, **options):
        script, folder = command[1], next(o.split('=')[1] for o in command if o.startswith(('--out_dir', '--ckpt')))
        calls.append((script, os.path.basename(folder), '--resume=True' in command))
        stop = interrupt and script == 'train.py' and folder.endswith('double_zero-32x2-seed1')
        inline(*command[1:], *['--max_steps=2'] * stop)
        return subprocess.CompletedProcess(command, int(stop))

    options = ['ablate.py', base, f'--out_dir={tmp_path}/out', f'--results_dir={tmp_path}/results', '--seeds=0,1',
               '--eval_options=--num_clips=3 --metrics= --device=cpu']
    arms = ['--axis=injection', '--only=cross_attention,cross_attention_double_zero']
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, 'run', in_process)
        assert 'ended with 1; the same ablate.py command goes on' in error(*options, *arms)
        before, interrupt = len(calls), False
        inline(*options, *arms)
        last = 'x-cross_attention_double_zero-32x2-seed1'
        assert calls[before:] == [('train.py', last, True), ('evaluate.py', last, False)]
        text = (tmp_path / 'results' / 'injection_tiny.md').read_text()
        inline(*options, *arms)
        assert len(calls) == before + 2
        inline(*options, '--axis=steps', '--only=x', '--seeds=0', '--solvers=ddim', '--steps=1,3')
        assert [c[0] for c in calls[before + 2:]] == ['train.py'] + ['evaluate.py'] * 3
    folders = {os.path.basename(f): f for f in map(str, (tmp_path / 'out' / 'tiny').iterdir())}
    gaps = {name: figures(f)['means']['gap_psnr'] for name, f in folders.items()}
    assert len(gaps) == 5 and all((gap == 0) == ('double_zero' in name) for name, gap in gaps.items())
    assert read_checkpoint(folders[last])[2]['step'] == 4
    assert '| cross_attention_double_zero | 0.0' in text and '0.00 ± 0.00 | 0.00 to 0.00 | 0.00, 0.00 |' in text
    assert '| copy |  |  | ' in text
    assert {'injection_tiny.png', 'steps_tiny.png'} <= set(os.listdir(tmp_path / 'results'))
    lines = (tmp_path / 'results' / 'steps_tiny.md').read_text().splitlines()
    row = next(line for line in lines if line.startswith('| x |'))  # the last number of steps is in its own interval
    mean = figures(f'{folders["x-additive-32x2-seed0"]}/ddim-3')['means']['psnr']
    assert row.startswith(f'| x | {mean:.2f} [') and row.endswith(('| 1 |', '| 3 |'))
    assert "axis='size'" in error(*options, '--axis=size') and "only='w'" in error(*options, '--only=w')
