"""Numbers computed with the reference implementation, float32 on CPU: ours must agree."""
import glob
import json
import os

import pytest
import torch
from safetensors import safe_open

from diffusion import Diffusion, schedule_matrix
from model import NanoWM, NanoWMConfig

GOLDEN = os.path.join(os.path.dirname(__file__), 'golden')


def read(name):
    with safe_open(os.path.join(GOLDEN, name), 'pt') as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}


def names(pattern):
    return sorted(os.path.basename(p) for p in glob.glob(os.path.join(GOLDEN, pattern)))


def assert_close(ours, golden, tolerance):
    """Largest difference relative to the largest value."""
    assert (ours - golden).abs().max() <= tolerance * golden.abs().max()


def build(tensors, meta):
    config = NanoWMConfig(**json.loads(meta['config']), injection=meta['injection'],
                          causal=meta.get('causal') != 'false')
    model = NanoWM(config).eval()
    prefix = 'weights.'
    model.load_state_dict({k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}, strict=True)
    return model


@pytest.mark.parametrize('name', names('model_*.safetensors'))
def test_model_output_equals_reference(name):
    g, meta = read(name)
    with torch.no_grad():
        assert_close(build(g, meta)(g['x'], g['t'], g['action']), g['out'], 1e-4)


@pytest.mark.parametrize('schedule', ['linear', 'squaredcos_cap_v2'])
@pytest.mark.parametrize('ztsnr', [False, True])
def test_alpha_tables_equal_reference(schedule, ztsnr):
    g, _ = read('diffusion.safetensors')
    ours = Diffusion('v', schedule, ztsnr).alphas_cumprod
    assert_close(ours, g[f'alphas_cumprod.{schedule}.ztsnr{int(ztsnr)}'], 1e-6)


@pytest.mark.parametrize('pred', ['epsilon', 'x', 'v', 'flow'])
def test_noising_loss_and_ddim_step_equal_reference(pred):
    g, _ = read('diffusion.safetensors')
    d = Diffusion(pred, snr_gamma=0.0)
    x0, eps, t, out = g['x0'], g['eps'], g['t'], g['model_out']
    assert_close(d.add_noise(x0, t, eps), g[f'{pred}.x_t'], 1e-6)
    for b in range(len(x0)):
        clip = slice(b, b + 1)
        ours = d.loss(lambda x, t, a, clip=clip: out[clip], x0[clip], t=t[clip], noise=eps[clip])
        assert_close(ours, g[f'{pred}.mse_per_sample'][b], 1e-5)
    curr, after = g['ddim.curr_t'], g['ddim.next_t']
    assert_close(d.ddim_step(x0, curr, after, out)[0], g[f'{pred}.ddim.sample'], 2e-4)
    assert_close(d.invert(x0, curr, out)[0], g[f'{pred}.ddim.pred_x0'], 2e-4)


def test_sampling_schedules_equal_reference():
    with open(os.path.join(GOLDEN, 'schedules.json')) as f:
        golden = json.load(f)
    for name, rows in golden.items():
        mode, frames, context, steps = name.split('.')
        grid = Diffusion('v').timesteps(int(steps[5:]))
        ours = schedule_matrix(mode, int(frames[6:]), int(context[7:]), grid)
        assert ours.tolist() == rows, name


@pytest.mark.parametrize('name', names('rollout_*.safetensors'))
def test_rollout_equals_reference(name):
    g, meta = read(name)
    weights, _ = read(f'rollout_{meta["pred_name"]}_sequential.safetensors')
    model = build(weights, meta)
    d = Diffusion(meta['pred_name'], meta['noise_schedule'], meta['zero_terminal_snr'] == 'True')
    K, N = g['context'].shape[1], g['out'].shape[1]
    ours = d.sample(model, g['context'], g['action'], N, int(meta['steps']), schedule=meta['schedule'],
                    stabilization=float(meta['stabilization']), noise=g['init_noise'], context_noise=g['context_noise'])
    assert torch.equal(ours[:, :K], g['context'])  # users get the clean context back
    assert_close(ours[:, K:], g['out'][:, K:], 1e-3)
