"""Truths about weights files: ours, those that others wrote, hostile ones, and the Hugging Face hub."""
import collections
import copy
import functools
import http.server
import json
import math
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import types
import zipfile
from dataclasses import asdict
from unittest import mock

import pytest
import torch
from conftest import ROOT, TRAIN, error, run
from safetensors.torch import save_file
from test_golden import assert_close, names, read
from test_model import inputs, tiny

import checkpoint as checkpoint_module
from checkpoint import (
    choose,
    config_of,
    find,
    hub_file,
    load_model,
    read_checkpoint,
    read_meta,
    restore_training,
    save_checkpoint,
    training_state,
)
from configurator import UserError
from data import Clips
from model import NanoWM, NanoWMConfig
from run import held_out, load_run


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


def test_a_write_replaces_what_a_killed_one_left(tmp_path):
    model, stray = tiny(), tmp_path / 'unfinished.tmp'
    stray.write_bytes(b'half a file')
    save_checkpoint(str(tmp_path / 'latest.safetensors'), model.state_dict(), model.config)
    assert os.listdir(tmp_path) == ['latest.safetensors']


def test_a_full_disk_gets_one_line_and_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model, path = tiny(), str(tmp_path / 'm.safetensors')
    save_checkpoint(path, model.state_dict(), model.config, step=1)

    def full(fd):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match=f'^cannot write {path}: .*No space left'):
        save_checkpoint(path, model.state_dict(), model.config, step=2)
    assert load_model(path)[1]['step'] == 1


def some_training(average, steps=2):
    """A model, its average (or itself), and its optimizer after a few steps; one parameter is frozen."""
    model = tiny().train()
    model.temp_embed.requires_grad_(False)
    ema = model
    if average:
        ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        train_step(model, optimizer)
    return model, ema, optimizer


def train_step(model, optimizer):
    model(*inputs()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize('average', [True, False])
@pytest.mark.parametrize('steps', [0, 2])
def test_restored_training_goes_on_bit_for_bit(average, steps, tmp_path):
    model, ema, optimizer = some_training(average, steps)
    path, state = str(tmp_path / 'm.safetensors'), training_state(model, ema, optimizer)
    save_checkpoint(path, state, model.config, step=2, scaler={})
    fresh = some_training(average, steps=0)
    assert restore_training(path, *fresh) == {'step': 2, 'scaler': {}}
    again = training_state(*fresh)
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)
    for trained, its_optimizer in ((model, optimizer), (fresh[0], fresh[2])):
        train_step(trained, its_optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), fresh[0].parameters(), strict=True))


def test_a_checkpoint_has_the_names_it_always_had():
    model, ema, optimizer = some_training(average=True)
    names, trainable = list(model.state_dict()), len(list(model.parameters())) - 1
    want = {*names, *(f'train.model.{name}' for name in names)}
    want |= {f'train.adam.{i}.{k}' for i in range(trainable) for k in ('step', 'exp_avg', 'exp_avg_sq')}
    state = training_state(model, ema, optimizer)
    assert state.keys() == want
    for i, moments in optimizer.state_dict()['state'].items():
        assert torch.equal(state[f'train.adam.{i}.exp_avg'], moments['exp_avg'])


def test_moments_of_another_model_are_refused(tmp_path):
    model, ema, optimizer = some_training(average=True)
    state = training_state(model, ema, optimizer) | {'train.adam.3.exp_avg': torch.zeros(1)}
    save_checkpoint(str(tmp_path / 'm.safetensors'), state, model.config, step=2, scaler={})
    with pytest.raises(UserError, match='does not fit this optimizer: train.adam.3.exp_avg is'):
        restore_training(str(tmp_path / 'm.safetensors'), model, ema, optimizer)


def test_a_checkpoint_without_its_moments_does_not_go_on(tmp_path):
    (model, ema, optimizer), path = some_training(average=True), str(tmp_path / 'm.safetensors')
    save_checkpoint(path, ema.state_dict(), model.config, step=2, scaler={})
    with pytest.raises(UserError, match='holds no optimizer state: start from it with --init_from'):
        restore_training(path, model, ema, optimizer)


BIAS = 'final_layer.linear.bias'


@pytest.mark.parametrize('change, message', [
    ({'pos_embed': None}, r"KeyError: 'pos_embed'|pos_embed is missing, not \(1, 16, 32\)$"),
    ({BIAS: None}, rf'does not fit this model: {BIAS} is missing, not \(12,\)$'),
    ({'extra': torch.zeros(1)}, r'does not fit this model: extra is \(1,\), not expected$'),
    ({BIAS: torch.zeros(3)}, rf'does not fit this model: {BIAS} is \(3,\), not \(12,\)$'),
    ({f'extra{i}': torch.zeros(1) for i in range(22)}, 'not expected and 12 more$'),
    ({BIAS: torch.full((12,), math.nan)}, f'{BIAS} is not finite'),
    ({BIAS: torch.full((12,), math.inf)}, f'{BIAS} is not finite'),
    ({BIAS: torch.zeros(12, dtype=torch.int64)}, f'{BIAS} is of type torch.int64'),
    ({'blocks.0.attn.q_norm.weight': torch.zeros(0)}, r'm.safetensors describes no NanoWM|q_norm.weight is \(0,\)'),
    ({'temp_embed': torch.zeros(1)}, r'm.safetensors describes no NanoWM|temp_embed is \(1,\)'),
    ({'x_embedder.proj.weight': torch.zeros(40000, 0, 2, 2)}, '40000'),
])
@pytest.mark.parametrize('ours', [True, False])
def test_weights_that_do_not_fit_are_named(change, message, ours, tmp_path):
    model, path = tiny(input_size=8), str(tmp_path / 'm.safetensors')
    state = {name: x for name, x in (model.state_dict() | change).items() if x is not None}
    if ours:
        save_checkpoint(path, state, model.config)
    else:
        save_file(state, path)
    with pytest.raises(UserError, match=message):
        load_model(path)


@pytest.mark.parametrize('claim, message', [
    (dict(depth=10 ** 9), 'm.safetensors describes no NanoWM .*1,000,000,000 blocks'),
    (dict(depth=6), 'blocks.4.* is missing'),
    (dict(hidden_size=40000), r'is \(32,\), not \(40000,\)'),
    (dict(num_frames=10 ** 9), r'temp_embed is \(1, 4, 32\), not \(1, 1000000000, 32\)'),
    (dict(input_size=10 ** 6), r'pos_embed is \(1, 24, 32\), not \(1, 250000000000, 32\)'),
    (dict(input_size=(-8, -12)), 'm.safetensors'),
    (dict(patch_size=0), 'ZeroDivisionError'),
    (dict(hidden_size=32.0), 'm.safetensors describes no NanoWM .TypeError'),
    (dict(num_heads='2'), 'TypeError'),
    (dict(injection='film'), 'film_modulation.1.bias is missing'),
    (dict(injection=['film']), 'TypeError'),
    (dict(unheard_of=1), "unexpected keyword argument 'unheard_of'"),
])
def test_a_claim_in_the_metadata_is_compared_with_the_tensors(claim, message, tmp_path):
    model, path = tiny(), str(tmp_path / 'm.safetensors')
    info = {'config': json.dumps(asdict(model.config) | claim), 'meta': '{}'}
    save_file(model.state_dict(), path, metadata=info)
    with pytest.raises(UserError, match=message):
        load_model(path)


@pytest.mark.parametrize('info', [{'meta': '{}'}, {'meta': '{', 'config': '{}'}, {'meta': '{}', 'config': '[]'}])
def test_broken_metadata_gets_one_line(info, tmp_path):
    save_file(tiny().state_dict(), tmp_path / 'm.safetensors', metadata=info)
    with pytest.raises(UserError, match='m.safetensors is not a readable safetensors file'):
        load_model(str(tmp_path / 'm.safetensors'))


@pytest.mark.parametrize('make, message', [
    (lambda path: None, 'no checkpoint at'),
    (os.mkdir, 'no checkpoint at'),
    (os.mkfifo, 'a pipe'),
    (lambda path: path.write_bytes(b''), 'not a readable'),
    (lambda path: path.write_bytes(b'\xff' * 100), 'not a readable'),
    (lambda path: path.write_bytes((2 ** 62).to_bytes(8, 'little') + b'{}'), 'not a readable'),
])
@pytest.mark.parametrize('suffix', ['safetensors', 'pt'])
def test_a_file_that_is_no_checkpoint_gets_one_line(make, message, suffix, tmp_path):
    path = tmp_path / f'm.{suffix}'
    make(path)
    with pytest.raises(UserError, match=f'{message}.*'):
        load_model(str(path))


@pytest.mark.parametrize('write', [save_file, torch.save])
def test_a_file_cut_short_gets_one_line(write, tmp_path):
    path = tmp_path / f'm.{"safetensors" if write is save_file else "pt"}'
    write(tiny().state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=f'^{path} is not a readable .* file'):
        load_model(str(path))


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


@pytest.mark.parametrize('height, width', [(320, 512), (256, 256)])
def test_weights_for_frames_of_either_published_shape_load(height, width, tmp_path):
    config = NanoWMConfig(input_size=(height // 8, width // 8), hidden_size=16, depth=2, num_heads=2, action_dim=51)
    path = str(tmp_path / 'm.pt')
    bare(NanoWM(config).state_dict(), path)
    if height == width:
        assert load_model(path)[0].config == config
    else:
        with pytest.raises(UserError, match='its 640 patches make no square: add --input_size=height,width'):
            load_model(path)
        with pytest.raises(UserError, match=r'pos_embed is \(1, 640, 16\), not \(1, 600, 16\)'):
            load_model(path, input_size=(40, 60))
    assert load_model(path, input_size=config.input_size)[0].config == config


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
    except UserError as e:
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


def test_a_tensor_in_the_place_of_a_state_dict_is_no_model(tmp_path):
    torch.save({'state_dict': torch.zeros(3)}, tmp_path / 'm.pt')
    with pytest.raises(UserError, match='holds no weights'):
        load_model(str(tmp_path / 'm.pt'))


def test_a_file_without_a_model_says_so(tmp_path):
    torch.save({'state_dict': {'conv.weight': torch.ones(2)}}, tmp_path / 'm.pt')
    with pytest.raises(UserError, match='holds no weights of a NanoWM: x_embedder.proj.weight is missing'):
        load_model(str(tmp_path / 'm.pt'))


def huge(state):
    """Every tensor stretched over the same few bytes: a model of gigabytes in a file of kilobytes."""
    return {name: torch.ones(1).expand(40000, *x.shape[1:]) for name, x in state.items()}


def shared(state):
    """All blocks share their bytes: a file can claim as many of them as it has names."""
    first = {name: x for name, x in state.items() if name.startswith('blocks.0.')}
    return state | {name.replace('.0.', f'.{i}.', 1): x for i in range(50) for name, x in first.items()}


def names_only(state):
    return state | {f'blocks.{i}.x': torch.zeros(()) for i in range(2000)}


@pytest.mark.parametrize('bomb, message', [
    (huge, 'holds no weights'),
    (shared, 'more numbers than it has room for'),
    (names_only, 'describes no NanoWM .*2,000 blocks')])
def test_a_small_file_cannot_ask_for_a_large_model(bomb, message, tmp_path):
    torch.save(bomb(tiny(input_size=8).state_dict()), tmp_path / 'm.pt')
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path / 'm.pt'))


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


def test_what_a_file_does_not_say_is_asked_for_by_name(published):
    assert error('sample.py', f'--ckpt={published}') == (
        f'{published} does not say how it was trained: add --pred_name= --frame_interval= --context_frames= --dataset=')


@pytest.mark.parametrize('wrong, message', [
    (dict(frame_interval=None), 'trained: add --frame_interval=$'),
    (dict(pred_name='y'), "pred_name='y'"),
    (dict(injection='film'), 'film_modulation.1.bias is missing'),
])
def test_what_is_told_wrongly_is_refused(wrong, message, published, wall):
    told = dict(device='cpu', dataset=wall, context_frames=1, pred_name='x', frame_interval=1)
    with pytest.raises(UserError, match=message):
        load_run(published, **{**told, **wrong})


def test_a_run_of_ours_is_told_nothing(trained):
    with pytest.raises(UserError, match='knows how it was trained: leave out --pred_name$'):
        load_run(trained, 'cpu', pred_name='x')


@pytest.mark.parametrize('kind', ['trained', 'published'])
def test_training_starts_from_weights(kind, wall, tmp_path, request):
    path = request.getfixturevalue(kind)
    run(*TRAIN, f'--dataset={wall}', f'--out_dir={tmp_path}/run', f'--init_from={path}', '--max_steps=1',
        '--learning_rate=0')
    state, _, meta = read_checkpoint(f'{tmp_path}/run', train=True)
    assert meta['step'] == 1
    for name, x in read_checkpoint(path)[0].items():
        assert torch.equal(state[name], x) and torch.equal(state[f'train.model.{name}'], x), name


def test_weights_to_start_from_must_fit(published, wall, tmp_path):
    line = error(*TRAIN, f'--dataset={wall}', f'--out_dir={tmp_path}/run', '--num_frames=5', f'--init_from={published}')
    assert 'does not fit this model: temp_embed is (1, 4, 32), not (1, 5, 32)' in line


def test_only_a_checkpoint_of_ours_goes_on(published):
    with pytest.raises(UserError, match='start from it with --init_from, not --resume'):
        read_meta(published)


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


def test_a_hub_id_is_fetched(hub, told, tmp_path):
    pytest.importorskip('huggingface_hub')
    hub += ['README.md', 'step=10.ckpt', 'step=9.ckpt', 'other.pt']
    out = run('sample.py', '--ckpt=someone/tiny', *told, '--num_clips=1', '--num_steps=1', f'--out={tmp_path}/a.gif')
    assert 'someone/tiny: using step=10.ckpt' in out and os.path.exists(tmp_path / 'a.gif')


@pytest.mark.parametrize('repo_id, message', [
    ('someone/tiny', 'none of its files ends in .safetensors'),
    ('someone/else', '404'),
])
def test_a_hub_id_without_weights_gets_one_line(repo_id, message, hub):
    pytest.importorskip('huggingface_hub')
    # in a process of its own, as the library reads the server's address only once
    ask = [sys.executable, '-c', f'import checkpoint; checkpoint.hub_file({repo_id!r})']
    done = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True)
    assert f'UserError: {repo_id} is neither here nor to be had' in done.stderr and message in done.stderr


def test_without_the_hubs_library_its_name_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(UserError, match='pip install huggingface_hub'):
        hub_file('someone/tiny')


def test_one_of_many_files_is_chosen_by_kind_then_name():
    assert choose(['a/last.ckpt', 'epoch=9-step=90.ckpt', 'epoch=10-step=7.ckpt', 'b.pt']) == 'a/last.ckpt'
    assert choose(['epoch=9-step=90.ckpt', 'epoch=10-step=95.ckpt', 'b.pt']) == 'epoch=10-step=95.ckpt'
    assert choose(['latest.ckpt', 'step_3.safetensors']) == 'step_3.safetensors'
    assert choose(['config.json']) == ''


def test_a_folder_means_its_own_checkpoint_before_one_in_a_folder_below(tmp_path):
    for name in ('aa', 'zz', '.'):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / 'step_0000007.safetensors').touch()
    (tmp_path / 'aa' / 'latest.safetensors').touch()
    assert find(str(tmp_path)) == str(tmp_path / 'step_0000007.safetensors')
    (tmp_path / 'step_0000007.safetensors').unlink()
    assert find(str(tmp_path)) == str(tmp_path / 'aa' / 'latest.safetensors')


@pytest.mark.parametrize('meta', [{'scaler': {}}, {'step': 2}, {'step': -1, 'scaler': {}}], ids=str)
def test_a_checkpoint_without_a_usable_step_or_scaler_does_not_go_on(meta, tmp_path):
    (model, ema, optimizer), path = some_training(average=False), str(tmp_path / 'm.safetensors')
    save_checkpoint(path, training_state(model, ema, optimizer), model.config, **meta)
    with pytest.raises(UserError, match=f'^{path}: its metadata lacks step or scaler'):
        restore_training(path, model, ema, optimizer)
