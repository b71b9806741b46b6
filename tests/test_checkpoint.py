"""Truths about weights files: ours, those that others wrote, hostile ones, and the Hugging Face hub."""
import collections
import functools
import http.server
import json
import os
import pathlib
import pickle
import sys
import threading
import types
import zipfile
from unittest import mock

import pytest
import torch
from conftest import TRAIN, error, run
from safetensors.torch import save_file
from test_golden import assert_close, names, read
from test_model import inputs, tiny

import checkpoint as checkpoint_module
from checkpoint import choose, config_of, hub_file, load_model, load_weights, read_checkpoint, save_checkpoint
from data import Clips
from model import NanoWM, NanoWMConfig
from sample import held_out, load_run


def test_saved_and_loaded_model_is_the_same(tmp_path):
    model, path = tiny(injection='film'), str(tmp_path / 'm.safetensors')
    save_checkpoint(path, {**model.state_dict(), 'train.x': torch.zeros(3)}, model.config, step=7)
    loaded, meta = load_model(path)
    assert meta == {'step': 7} and loaded.config == model.config
    with torch.no_grad():
        assert torch.equal(loaded(*inputs()), model(*inputs()))


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model, path = tiny(), str(tmp_path / 'm.safetensors')
    save_checkpoint(path, model.state_dict(), model.config, step=1)

    def half(state, tmp, metadata):
        with open(tmp, 'wb') as f:
            f.write(b'half a file')
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module, 'save_file', half)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, model.state_dict(), model.config, step=2)
    assert load_model(path)[1]['step'] == 1


def test_unusable_checkpoints_say_why(tmp_path):
    path = str(tmp_path / 'm.safetensors')
    with pytest.raises(FileNotFoundError, match='no checkpoint at'):
        load_model(path)
    model = tiny()
    state = model.state_dict()
    state.pop('pos_embed')
    save_checkpoint(path, {**state, 'extra': torch.zeros(1)}, model.config)
    with pytest.raises(ValueError, match=r'extra is \(1,\), not expected; pos_embed is missing, not \(1, 24, 32\)'):
        load_model(path)
    with open(path, 'r+b') as f:
        f.truncate(5000)
    with pytest.raises(ValueError, match='not a readable safetensors file'):
        read_checkpoint(path)


# -----------------------------------------------------------------------------
# files that others wrote

def lightning(state, path, prefix='model.'):
    """What a Lightning trainer saves: prefixed weights beside a VAE, an EMA copy, optimizer states and callbacks."""
    weights = {f'{prefix}{k}': v for k, v in state.items()}
    weights |= {f'ema_model.{k}': torch.zeros_like(v) for k, v in state.items()}
    weights |= {'vae.encoder.conv_in.weight': torch.ones(3), f'{prefix}rope.freqs': torch.ones(2)}
    alien = types.ModuleType('alien')
    alien.Alien = type('Alien', (), {'__module__': 'alien', '__reduce__': lambda self: (alien.Alien, (1,), ({2}, [3]))})
    callbacks = [alien.Alien(), collections.deque([1]), collections.defaultdict(list, a=[1]), pathlib.PurePath('a')]
    saved = {'epoch': 3, 'state_dict': collections.OrderedDict(weights), 'callbacks': callbacks,
             'hyper_parameters': {'net': torch.nn.Linear(2, 2)}, 'optimizer_states': [{'exp_avg': torch.ones(9)}]}
    with mock.patch.dict(sys.modules, alien=alien):  # afterwards nobody knows that class
        torch.save(saved, path)


def bare(state, path, prefix=''):
    torch.save({f'{prefix}{k}': v for k, v in state.items()}, path)


ROUTES = {
    'lightning.ckpt': lightning,
    'compiled.ckpt': functools.partial(lightning, prefix='model._orig_mod.'),
    'bare.pt': bare,
    'bare_compiled.pth': functools.partial(bare, prefix='_orig_mod.'),
    'bare.safetensors': save_file,
    'with_vae.safetensors': lambda state, path: save_file(state | {'vae.quant_conv.bias': torch.ones(3)}, path),
}


@pytest.mark.parametrize('name', names('model_*.safetensors') + names('rollout_*_sequential.safetensors'))
def test_published_weights_give_the_reference_output_however_they_are_wrapped(name, tmp_path):
    golden, meta = read(name)
    state = {k.removeprefix('weights.'): v for k, v in golden.items() if k.startswith('weights.')}
    causal = meta.get('causal') != 'false'
    for route, write in ROUTES.items():
        write(state, str(tmp_path / route))
        model, _ = load_model(str(tmp_path / route), injection=meta['injection'], causal=causal)
        assert model.config == NanoWMConfig(**json.loads(meta['config']), injection=meta['injection'], causal=causal)
        with torch.no_grad():
            if 'x' in golden:
                assert_close(model(golden['x'], golden['t'], golden['action']), golden['out'], 1e-4)
            else:
                assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), route


@pytest.mark.parametrize('injection', ['additive', 'adaln', 'film', 'cross_attention'])
def test_the_config_is_read_off_the_tensors(injection):
    for shape in (dict(hidden_size=32, depth=2, num_heads=2, action_dim=0, num_frames=7),
                  dict(hidden_size=48, depth=4, num_heads=3, patch_size=4, in_channels=3)):
        config = NanoWMConfig(input_size=16, **shape, injection=injection)
        assert config_of(NanoWM(config).state_dict()) == config


class Evil:
    """Runs a function when it is unpickled."""
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def outcome(path, state):
    """A hostile file is read with the thing inert, or refused in one line."""
    try:
        assert read_checkpoint(path)[0].keys() == state.keys()
    except ValueError as e:
        assert path in str(e) and '\n' not in str(e)


@pytest.mark.parametrize('function', [os.system, eval, exec, os.mkdir])
def test_a_hostile_object_in_a_checkpoint_never_runs(tmp_path, function):
    marker, path = str(tmp_path / 'marker'), str(tmp_path / 'evil.ckpt')
    evil = Evil(function, {os.system: f'touch {marker}', os.mkdir: marker}.get(function, f'open({marker!r}, "w")'))
    state = tiny().state_dict()
    for saved in ({'state_dict': state, 'callbacks': evil}, {**state, 'extra': evil}, {'state_dict': evil}, evil):
        for zipped in (True, False):
            torch.save(saved, path, _use_new_zipfile_serialization=zipped)
            outcome(path, state)
    pathlib.Path(path).write_bytes(pickle.dumps(evil))
    outcome(path, state)
    assert not os.path.exists(marker)


def test_a_hand_made_pickle_never_runs(tmp_path):
    marker, path = str(tmp_path / 'marker'), str(tmp_path / 'evil.pt')
    for program in (f"(S'touch {marker}'\nios\nsystem\n.",
                    f"cbuiltins\ngetattr\n(cos\nmkdir\nS'__call__'\ntR(S'{marker}'\ntR.",
                    f"ccollections\nOrderedDict\n(N}}S'__init__'\ncos\nmkdir\nstb(S'{marker}'\ntR.",
                    f"ctorch._utils\n_rebuild_tensor_v2\n(N}}S'__code__'\ncos\nmkdir\nstb(S'{marker}'\ntR."):
        with zipfile.ZipFile(path, 'w') as z:
            z.writestr('a/data.pkl', program)
        outcome(path, {})
    assert not os.path.exists(marker)


def test_what_is_no_model_or_another_one_says_so(tmp_path):
    path = str(tmp_path / 'm.pt')
    torch.save({'state_dict': {'conv.weight': torch.ones(2)}}, path)
    with pytest.raises(ValueError, match='holds no weights of a NanoWM: x_embedder.proj.weight is missing'):
        load_model(path)
    state = tiny(input_size=8).state_dict()
    torch.save({k: v for k, v in state.items() if k != 'temp_embed'}, path)
    with pytest.raises(ValueError, match="m.pt: 'temp_embed' is missing"):
        load_model(path)
    bias = 'final_layer.linear.bias'
    torch.save({**{k: v for k, v in state.items() if 'w3' not in k}, 'extra': torch.ones(1), bias: torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r'blocks.3.mlp.w3.weight is missing.*extra is \(1,\).*bias is \(3,\)'):
        load_model(path)
    with pytest.raises(ValueError, match='and 12 more$'):
        load_weights(tiny(input_size=8, depth=5), {k: v for k, v in state.items() if 'blocks.0' not in k}, path)
    torch.save(state, path)
    with open(path, 'r+b') as f:
        f.truncate(5000)
    with pytest.raises(ValueError, match=r'is not a readable PyTorch \(1.6 or newer\) file'):
        load_model(path)


# -----------------------------------------------------------------------------
# the scripts on weights of others

@pytest.fixture(scope='session')
def published(trained, tmp_path_factory):
    """The run's weights, as a Lightning file."""
    path = str(tmp_path_factory.mktemp('published') / 'epoch=0-step=8.ckpt')
    lightning(read_checkpoint(trained)[0], path)
    return path


@pytest.fixture
def told(wall):
    return [f'--dataset={wall}', '--pred_name=x', '--frame_interval=1', '--context_frames=1']


def test_a_lightning_file_scores_like_the_run_that_it_came_from(trained, published, told, tmp_path):
    options = ['--num_clips=4', '--num_steps=2']
    run('evaluate.py', f'--ckpt={trained}', f'--out_dir={tmp_path}/own', *options)
    run('evaluate.py', f'--ckpt={os.path.dirname(published)}', f'--out_dir={tmp_path}/other', *options, *told)
    own, other = (json.loads((tmp_path / name / 'metrics.json').read_text()) for name in ('own', 'other'))
    for key in ('means', 'per_frame', 'per_clip'):
        assert own[key] == other[key]
    run('sample.py', f'--ckpt={trained}', f'--out={tmp_path}/own.gif', *options)
    run('sample.py', f'--ckpt={published}', f'--out={tmp_path}/other.gif', *options, *told)
    assert (tmp_path / 'own.gif').read_bytes() == (tmp_path / 'other.gif').read_bytes()


def test_actions_are_normalised_by_the_dataset_if_told_so(published, wall):
    told = dict(device='cpu', dataset=wall, context_frames=1, pred_name='x', frame_interval=1)
    own = Clips(wall, 'val', 4, normalize=True)
    model, diffusion, cfg = load_run(published, **told, normalize_action=True)
    assert torch.equal(held_out(model, cfg, 4).batch([3])[1], own.batch([3])[1])
    assert load_run(published, **told)[2]['action_scale'] == (0, 1)


def test_what_a_file_does_not_say_is_asked_for_by_name(trained, published, wall):
    assert error('sample.py', f'--ckpt={published}') == (
        f'{published} does not say how it was trained: add --pred_name= --frame_interval= --context_frames= --dataset=')
    told = dict(device='cpu', dataset=wall, context_frames=1, pred_name='x', frame_interval=1)
    for wrong, message in ((dict(frame_interval=None), 'trained: add --frame_interval=$'),
                           (dict(pred_name='y'), "pred_name='y'"),
                           (dict(injection='film'), 'film_modulation.1.bias is missing')):
        with pytest.raises(SystemExit, match=message):
            load_run(published, **{**told, **wrong})
    with pytest.raises(SystemExit, match='knows how it was trained: leave out --pred_name$'):
        load_run(trained, 'cpu', pred_name='x')


def test_training_starts_from_weights(trained, published, wall, tmp_path):
    source = read_checkpoint(trained)[0]
    for i, init in enumerate((trained, published)):
        out = [*TRAIN, f'--dataset={wall}', f'--out_dir={tmp_path}/{i}', f'--init_from={init}']
        run(*out, '--max_steps=1', '--learning_rate=0')
        state, _, meta = read_checkpoint(f'{tmp_path}/{i}', train=True)
        assert meta['step'] == 1
        for k, v in source.items():
            assert torch.equal(state[k], v) and torch.equal(state[f'train.model.{k}'], v), k
    run(*out, '--max_steps=2', '--resume=True', '--init_from=nothing')  # which wins
    assert read_checkpoint(f'{tmp_path}/1')[2]['step'] == 2
    longer = [*TRAIN, f'--dataset={wall}', f'--out_dir={tmp_path}/longer', '--num_frames=5', f'--init_from={published}']
    assert 'does not fit this model: temp_embed is (1, 4, 32), not (1, 5, 32)' in error(*longer)
    with pytest.raises(ValueError, match='start from it with --init_from, not --resume'):
        read_checkpoint(published, train=True)


# -----------------------------------------------------------------------------
# the Hugging Face hub, played by a server of three routes

@pytest.fixture
def hub(published, tmp_path, monkeypatch):
    """Serves the repository someone/tiny; yields the list of its files, to be filled."""
    files = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = b''
            if self.path.startswith('/api/models/someone/tiny'):
                body = json.dumps({'id': 'someone/tiny', 'siblings': [{'rfilename': f} for f in files]}).encode()
            elif self.path.startswith('/someone/tiny/resolve/'):
                body = pathlib.Path(published).read_bytes()
            self.send_response(200 if body else 404)
            self.send_header('Content-Length', str(len(body)))
            self.send_header('ETag', '"1"')
            self.send_header('X-Repo-Commit', '0' * 40)
            self.end_headers()
            self.wfile.write(body if self.command == 'GET' else b'')

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
    monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
    yield files
    server.shutdown()
    server.server_close()


def test_a_hub_id_is_fetched_and_mistakes_get_one_line(hub, told, tmp_path, monkeypatch):
    pytest.importorskip('huggingface_hub')
    ask = ['-c', 'import sys, checkpoint; checkpoint.hub_file(sys.argv[1])']
    assert 'none of its files ends in .safetensors' in error(*ask, 'someone/tiny')
    assert '404' in error(*ask, 'someone/else')
    hub += ['README.md', 'step=10.ckpt', 'step=9.ckpt', 'other.pt']
    out = run('sample.py', '--ckpt=someone/tiny', *told, '--num_clips=1', '--num_steps=1', f'--out={tmp_path}/a.gif')
    assert 'someone/tiny: using step=10.ckpt' in out and os.path.exists(tmp_path / 'a.gif')
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    assert 'someone/tiny is neither here nor to be had from the Hugging Face hub: ' in error(*ask, 'someone/tiny')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(SystemExit, match='pip install huggingface_hub'):
        hub_file('someone/tiny')


def test_one_of_many_files_is_chosen_by_kind_then_name():
    assert choose(['a/last.ckpt', 'epoch=9-step=90.ckpt', 'epoch=10-step=7.ckpt', 'b.pt']) == 'a/last.ckpt'
    assert choose(['epoch=9-step=90.ckpt', 'epoch=10-step=95.ckpt', 'b.pt']) == 'epoch=10-step=95.ckpt'
    assert choose(['latest.ckpt', 'step_3.safetensors']) == 'step_3.safetensors'
    assert choose(['config.json']) == ''
