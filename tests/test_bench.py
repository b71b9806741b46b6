"""Truths about bench.py."""
import json

import pytest
import torch
from conftest import error, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import forward_flops
from model import INJECTIONS, NanoWM, NanoWMConfig

TINY = ['--device=cpu', '--repeats=1', '--hidden_size=32', '--patch_size=4', '--depth=2', '--num_heads=2',
        '--dtype=fp32', '--cem_rollouts=2', '--sample_steps=2']


@pytest.mark.slow
def test_bench_measures_a_config_it_was_not_written_for(wall, tmp_path):
    run('bench.py', 'config/wall.py', *TINY, f'--dataset={wall}', f'--out={tmp_path}/out/bench.json')
    with open(tmp_path / 'out' / 'bench.json') as f:
        result = json.load(f)
    assert {'train_share_of_matmul', 'data', 'rollout_speedup', 'one_frame', 'cem_speedup'} <= result.keys()
    assert result['rollout_largest_difference'] < 1e-4
    assert result['cem_largest_difference'] < 1e-4


@pytest.mark.slow
def test_bench_needs_no_dataset(tmp_path):
    said = run('bench.py', *TINY, '--mode=data', '--frame_shape=(3, 8, 8)', f'--out={tmp_path}/bench.json')
    assert 'clips/s' in said


@pytest.mark.parametrize('option', ['--mode=speed', '--context_frames=9', '--injection=y', '--repeats=0',
                                    '--model_size=M', '--out=config'])
def test_a_mistake_ends_in_one_line_that_names_it(option):
    key = option[2:].split('=')[0]
    assert key in error('bench.py', *TINY, '--mode=rollout', option)


@pytest.mark.parametrize('injection', INJECTIONS)
def test_flops_are_those_of_the_matmuls(injection):
    model = NanoWM(NanoWMConfig(input_size=(8, 12), in_channels=3, hidden_size=32, depth=4, num_heads=2,
                                action_dim=3, injection=injection, causal=False))
    x, t, action = torch.randn(1, 4, 3, 8, 12), torch.zeros(1, 4).long(), torch.randn(1, 4, 3)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(x, t, action)
    assert abs(forward_flops(model) / counter.get_total_flops() - 1) < 0.05
