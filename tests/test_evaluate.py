"""Truths about evaluate.py."""
import json
import os

import numpy as np
import pytest
import torch
from conftest import TRAIN, error, inline, run
from test_metrics import I3D

from data import to_model
from evaluate import evaluate, suffix_for, summarise, table
from metrics import WEIGHTS, frechet
from run import held_out, load_run
from sample import dream


def figures(folder, name='metrics'):
    with open(os.path.join(folder, f'{name}.json')) as f:
        metrics = json.load(f)
    assert metrics.pop('seconds') > 0
    return metrics


@pytest.fixture(scope='module')
def evaluated(trained):
    """(options, what is printed, the metrics) of an evaluation of five clips."""
    options = ['evaluate.py', f'--ckpt={trained}', '--num_clips=5', '--device=cpu']
    return options, inline(*options), figures(trained)


def assert_same_scores(metrics, others):
    assert metrics['clips'] == others['clips']
    for key, values in metrics['per_clip'].items():
        assert np.allclose(others['per_clip'][key], values, atol=1e-3 if 'psnr' in key else 1e-5), key


def test_an_evaluation_leaves_its_table_and_pictures(trained, evaluated):
    options, printed, metrics = evaluated
    assert {'clips.png', 'metrics.png'} <= set(os.listdir(trained))
    with open(os.path.join(trained, 'metrics.md')) as f:
        assert f.read() in printed
    assert metrics.keys() == {'settings', 'means', 'intervals', 'per_frame', 'per_clip', 'objects', 'clips', 'absent'}
    assert metrics['settings']['num_steps'] == 2
    assert len(metrics['per_frame']['psnr']) == 3
    assert len(metrics['clips']) == 5
    assert metrics['objects']['copy_agent'].keys() == {'found', 'distance', 'near', 'iou', 'per_frame'}
    assert 'agent, wrong actions' in printed
    assert 'needs 10 predicted frames' in metrics['absent']['fvd'] and 'no FVD: ' in printed


def test_one_seed_gives_one_result(trained, evaluated):
    options, _, metrics = evaluated
    inline(*options)
    assert figures(trained) == metrics


def test_batches_do_not_matter(evaluated, tmp_path):
    options, _, metrics = evaluated
    inline(*options, f'--out_dir={tmp_path}', '--batch_size=2')
    assert_same_scores(metrics, figures(tmp_path))


@pytest.mark.slow
def test_processes_do_not_matter(evaluated, tmp_path):
    options, _, metrics = evaluated
    run('-m', 'torch.distributed.run', '--nproc_per_node=2', *options, f'--out_dir={tmp_path}')
    assert_same_scores(metrics, figures(tmp_path))


@pytest.mark.parametrize('option, said', [
    ('--metrics=psnr', 'expected one of lpips, fid, fvd'),
    ('--lpips_net=resnet', 'expected one of vgg, alex'),
    ('--schedule=diagonal', "schedule='diagonal'"),
    ('--num_clips=1', 'num_clips=1: expected >= 2'),
    ('--context_frames=4', 'expected fewer than num_frames=4'),
])
def test_a_mistake_ends_in_one_line(option, said, evaluated):
    options, *_ = evaluated
    assert said in error(*options, option)


def test_results_of_one_of_several_checkpoints_carry_its_name(trained, tmp_path):
    for name in ('latest', 'step_0000020'):
        (tmp_path / f'{name}.safetensors').touch()
    assert suffix_for(str(tmp_path)) == suffix_for(f'{tmp_path}/latest.safetensors') == ''
    assert suffix_for('owner/name') == ''
    assert suffix_for(f'{tmp_path}/step_0000020.safetensors') == '-step_0000020'


def test_the_gap_is_right_minus_wrong_actions_clip_by_clip():
    right, wrong = torch.rand(9, 3), torch.rand(9, 3)
    results = summarise({'psnr': right, 'wrong_psnr': wrong})
    assert abs(results['means']['gap_psnr'] - (right - wrong).mean()) < 1e-6
    low, high = results['intervals']['gap_psnr']
    assert low < results['means']['gap_psnr'] < high
    assert np.allclose(results['per_clip']['gap_psnr'], (right - wrong).mean(dim=1))


def test_evaluate_gives_the_distances_whose_network_is_there(trained):
    model, diffusion, config = load_run(trained, 'cpu')
    clips = held_out(model, config, 5)
    networks = {'fvd': lambda x: x.mean(dim=(3, 4)).flatten(1)[:, None]}  # colours over time

    def rollout(frames, action, seed):
        return dream(model, diffusion, to_model(frames), action, 1, 1, seed)

    scores = evaluate(rollout, clips, clips.fixed(20), 1, networks=networks)
    results = summarise(scores)
    assert results['means']['fvd'] > 0 and 'wrong_fvd' in results['means']
    assert 'fvd' not in results['intervals']
    assert '| FVD |' in table('run', results['means'], results['intervals'])


def test_a_frame_that_is_not_a_number_makes_a_distance_that_is_none():
    assert np.isnan(frechet(torch.full((4, 3), torch.nan), torch.rand(4, 3)))


def logged_metrics(folder):
    with open(folder / 'log.jsonl') as f:
        return [line for line in map(json.loads, f) if 'gap_psnr' in line]


def test_training_logs_distances_alike_on_any_number_of_processes(wall, tmp_path, monkeypatch):
    weights = tmp_path / 'hub' / 'checkpoints' / WEIGHTS['i3d'][0]
    weights.parent.mkdir(parents=True)
    torch.jit.script(I3D()).save(weights)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    options = [*TRAIN, f'--dataset={wall}', '--num_frames=11', '--max_steps=1', '--metrics_every=1',
               '--metrics=lpips,fvd', '--num_metric_clips=6', '--sample_steps=1', '--val_every=0']
    printed = inline(*options, '--batch_size=4', f'--out_dir={tmp_path}/one')
    assert printed.count('no LPIPS: ') == 1 and 'no FVD' not in printed  # named once, with its cure
    assert 'pip install' in printed or 'curl -L' in printed
    run('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', *options, '--batch_size=2',
        f'--out_dir={tmp_path}/two')
    (one,), (two,) = logged_metrics(tmp_path / 'one'), logged_metrics(tmp_path / 'two')
    assert {'fvd', 'copy_fvd', 'wrong_fvd', 'psnr'} <= one.keys() == two.keys()
    assert all(two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5) for key in one)


def test_training_logs_the_metrics(wall, tmp_path):
    inline(*TRAIN, f'--dataset={wall}', f'--out_dir={tmp_path}', '--max_steps=2', '--metrics_every=1')
    logged = logged_metrics(tmp_path)
    assert [line['step'] for line in logged] == [1, 2]
    assert {'psnr', 'ssim', 'wrong_ssim'} <= logged[0].keys()
