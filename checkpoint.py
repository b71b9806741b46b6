"""Weights files: our own checkpoints, published ones in any wrapping, and Hugging Face ids.

Ours is one safetensors file: the weights under their own names, the model's config as JSON metadata
and, under "train.", whatever the training loop needs to go on. Others are a Lightning .ckpt, a bare
state dict or a bare .safetensors. Nothing in a file is executed, and no model is built before the
tensors bear out what the file claims.
"""
import glob
import json
import math
import os
import re
from dataclasses import asdict

import torch
import torch.distributed.checkpoint.state_dict as distributed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configurator import UserError, extra
from model import NanoWM, NanoWMConfig
from pickles import one_line, read_torch, refusing

SUFFIXES = ('.safetensors', '.ckpt', '.pt', '.pth', '.bin')  # in order of preference
# Lightning compiled and eager, bare compiled, in DDP and eager
PREFIXES = ('model._orig_mod.', 'model.', '_orig_mod.', 'module.', '')
OTHERS = r'vae\.|.*(rope|rotary|freq|_cos$|_sin$)'  # an autoencoder beside the model, rotary tables
# what names of tensors tell about the injection
INJECTION_MARKS = {'action_adaLN': 'adaln', 'film': 'film', 'cross_attn': 'cross_attention'}
MAX_DEPTH = 1000  # a block is 50 KB of Python objects even without weights
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# -----------------------------------------------------------------------------
# reading

def read_checkpoint(path, train=False):
    """(state, config, meta) of a file, folder or hub id; config is None if it is not of train.py.

    state is {name: tensor}; train=True adds the tensors under "train.". Raises UserError.
    """
    path = find(path)
    if path.endswith('.safetensors'):
        state, config, meta = read_safetensors(path, train)
    else:
        state, config, meta = read_pickle(path), None, {}
    if not state:
        raise UserError(f'{path} holds no weights of a NanoWM: x_embedder.proj.weight is missing')
    check_numbers(state, path)
    return state, config, meta


def read_safetensors(path, train):
    """(state, config, meta); a file of strangers has no metadata of ours."""
    config, meta = None, {}
    with refusing(path, 'safetensors'), safe_open(path, 'pt') as f:
        info, names = f.metadata() or {}, model_names(f.keys())
        if 'meta' in info:
            config, meta = NanoWMConfig(**json.loads(info['config'])), json.loads(info['meta'])
            names = {name: name for name in f.keys() if train or not name.startswith('train.')}
        return {name: f.get_tensor(key) for name, key in names.items()}, config, meta


def read_meta(path):
    """What train.py noted beside the tensors of a checkpoint file. Raises UserError."""
    meta = {}
    if path.endswith('.safetensors'):
        with refusing(path, 'safetensors'), safe_open(path, 'pt') as f:
            meta = json.loads((f.metadata() or {}).get('meta', '{}'))
    if not isinstance(meta, dict) or not isinstance(meta.get('train'), dict):
        raise UserError(f'{path} was not written by train.py: '
                        'start from it with --init_from, not --resume')
    return meta


def read_pickle(path):
    """The model's {name: tensor} in what torch.save wrote: the whole, or one of its entries."""
    tree = read_torch(path)
    for entry in ('state_dict', 'model'):
        if isinstance(tree, dict) and entry in tree:
            tree = tree[entry]
    if not isinstance(tree, dict):
        return {}
    tensors = {key: x for key, x in tree.items() if isinstance(x, torch.Tensor)}
    return {name: tensors[key] for name, key in model_names(tensors).items()}


def model_names(keys):
    """{parameter's name: its key in the file}; {} if there is no NanoWM in it."""
    for prefix in PREFIXES:
        if f'{prefix}x_embedder.proj.weight' in keys:
            ours = re.compile(f'{re.escape(prefix)}(?!{OTHERS})')
            return {key[len(prefix):]: key for key in keys if ours.match(key)}
    return {}


def check_numbers(state, path):
    """Weights are finite numbers with a point, and no more of them than the file has room for."""
    if sum(x.nbytes for x in state.values()) > os.path.getsize(path):
        raise UserError(f'{path} claims more numbers than it has room for: its tensors share bytes')
    for name, x in state.items():
        if x.dtype not in FLOATS:
            raise UserError(f'{path}: {name} is of type {x.dtype}; expected floating-point numbers')
        if not torch.isfinite(x).all():
            raise UserError(f'{path}: {name} is not finite, so the run that wrote it had diverged; '
                            'use an earlier checkpoint')


def config_of(state, injection=None, causal=None, input_size=None):
    """The NanoWMConfig of weights {name: tensor}.

    Tensors do not tell additive from adaln_fuse, causal or not, or the shape of a frame: None is
    additive, causal, and square. Raises whatever it may if these are not a NanoWM's.
    """
    hidden_size, channels, patch_size, _ = state['x_embedder.proj.weight'].shape
    action_dim = 0
    if 'action_embedder.mlp.0.weight' in state:
        action_dim = state['action_embedder.mlp.0.weight'].shape[1]
    for mark, name in INJECTION_MARKS.items():
        if any(mark in key for key in state):
            injection = injection or name
    patches = state['pos_embed'].shape[1]
    side = math.isqrt(patches)
    if input_size is None and side ** 2 != patches:
        raise ValueError(f'its {patches} patches make no square: add --input_size=height,width')
    return NanoWMConfig(
        input_size=input_size or side * patch_size,
        patch_size=patch_size,
        in_channels=channels,
        hidden_size=hidden_size,
        depth=len({name.split('.')[1] for name in state if name.startswith('blocks.')}),
        num_heads=hidden_size // len(state['blocks.0.attn.q_norm.weight']),
        num_frames=state['temp_embed'].shape[1],
        action_dim=action_dim,
        injection=injection or 'additive',
        causal=causal is not False)


# -----------------------------------------------------------------------------
# into a model

def load_model(path, device='cpu', **options):
    """(model, meta) of a checkpoint; options help config_of. Raises UserError."""
    state, config, meta = read_checkpoint(path)
    try:
        config = config or config_of(state, **options)
        if config.depth > MAX_DEPTH:
            raise ValueError(f'{config.depth:,} blocks')
        with torch.device('meta'):  # shapes only: they have to be those of the tensors
            sketch = NanoWM(config)
    except Exception as e:  # whatever the tensors lack or the metadata claims
        raise UserError(f'{path} describes no NanoWM ({one_line(e)})') from e
    check_fit(sketch, state, path)
    model = NanoWM(config)
    model.load_state_dict(state)
    return model.to(device).eval(), meta


def load_weights(model, state, path):
    """Put {name: whole tensor} into a model, be it sharded or not. Raises UserError."""
    check_fit(model, state, path)
    options = distributed.StateDictOptions(full_state_dict=True)
    distributed.set_model_state_dict(model, state, options=options)


def check_fit(model, state, path):
    """Raises UserError that names the tensors whose shapes are not the model's."""
    want = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    have = {name: tuple(x.shape) for name, x in state.items()}
    wrong = [f'{name} is {have.get(name, "missing")}, not {want.get(name, "expected")}'
             for name in sorted({*want, *have}) if want.get(name) != have.get(name)]
    if len(wrong) > 10:
        wrong[9:] = [f'{wrong[9]} and {len(wrong) - 10} more']
    if wrong:
        raise UserError(f'{path} does not fit this model: {"; ".join(wrong)}')


# -----------------------------------------------------------------------------
# writing, and going on

def save_checkpoint(path, state, config, **meta):
    """Write {name: tensor} with the model's config and JSON-able meta to `path`, atomically.

    Raises UserError if the disk is full or read-only.
    """
    state = {name: x.detach().cpu().contiguous() for name, x in state.items()}
    info = {'config': json.dumps(asdict(config)), 'meta': json.dumps(meta)}
    # a kill leaves the old file or the new, and one unfinished file that the next write replaces
    tmp = os.path.join(os.path.dirname(path), 'unfinished.tmp')
    try:
        save_file(state, tmp, metadata=info)
        with open(tmp, 'rb') as f:
            os.fsync(f.fileno())
        os.chmod(tmp, 0o644)  # save_file leaves it readable by its owner only
        os.replace(tmp, path)
    except (OSError, SafetensorError) as e:
        raise UserError(f'cannot write {path}: {e}; what was saved before is still whole') from e


def training_state(model, ema, optimizer):
    """{name: tensor} for save_checkpoint on the first process, {} on the others.

    Every process has to call it: they put together what FSDP has cut. The weights to use (`ema`, or
    the model itself) go under their own names; beside an EMA, the model's under "train.model."; and
    what the optimizer keeps for parameter i, under "train.adam.i.".
    """
    options = distributed.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dict(distributed.get_model_state_dict(ema, options=options))
    if ema is not model:
        for name, x in distributed.get_model_state_dict(model, options=options).items():
            state[f'train.model.{name}'] = x
    moments = distributed.get_optimizer_state_dict(model, optimizer, options=options)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for i, name in enumerate(names):
        for key, x in moments.get('state', {}).get(name, {}).items():
            state[f'train.adam.{i}.{key}'] = x
    return state


def restore_training(path, model, ema, optimizer):
    """Put training_state's tensors back, sharded or not; the file's meta. Raises UserError."""
    state, _, meta = read_checkpoint(path, train=True)
    if type(meta.get('step')) is not int or meta['step'] < 0 or type(meta.get('scaler')) is not dict:
        raise UserError(f'{path}: its metadata lacks step or scaler; use an earlier checkpoint')
    average = {name: x for name, x in state.items() if not name.startswith('train.')}
    prefix = 'train.model.'
    weights = {name[len(prefix):]: x for name, x in state.items() if name.startswith(prefix)}
    load_weights(ema, average, path)
    load_weights(model, weights or average, path)
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    names = list(shapes)  # in the optimizer's order
    moments = {name: {} for name in names}
    for key, x in state.items():
        match = re.fullmatch(r'train\.adam\.(\d+)\.(\w+)', key)
        if match:
            i = int(match[1])
            if i >= len(names) or x.ndim and x.shape != shapes[names[i]]:
                raise UserError(f'{path} does not fit this optimizer: {key} is {tuple(x.shape)}')
            moments[names[i]][match[2]] = x
    if any(moments.values()):
        restored = distributed.get_optimizer_state_dict(model, optimizer) | {'state': moments}
        options = distributed.StateDictOptions(full_state_dict=True)
        distributed.set_optimizer_state_dict(model, optimizer, restored, options=options)
    elif meta['step'] > 0:
        raise UserError(f'{path} holds no optimizer state: start from it with --init_from')
    return meta


# -----------------------------------------------------------------------------
# finding a file

def choose(names):
    """Of the first suffix that occurs, the file called latest or last, or with most steps; or ''."""
    def rank(name):
        base = os.path.basename(name)
        return bool(re.search('la(te)?st', base)), [int(d) for d in re.findall(r'\d+', base)]

    for suffix in SUFFIXES:
        found = [name for name in names if name.endswith(suffix)]
        if found:
            return max(found, key=rank)
    return ''


def find(path):
    """The weights file that a file, a folder or a hub id means. Raises UserError."""
    if os.path.isdir(path):
        # its own first: a folder below it may be another run's
        name = choose(glob.glob('*', root_dir=path)) or choose(glob.glob('**', root_dir=path, recursive=True))
        if name and name != 'latest.safetensors':
            print(f'{path}: using {name}')
        if name:
            return os.path.join(path, name)
    elif os.path.exists(path):
        return path
    elif re.fullmatch(r'(?!out/)[\w-][\w.-]*/[\w.-]+', path) and not path.endswith(SUFFIXES):
        return hub_file(path)
    raise UserError(f'no checkpoint at {path}: train one with python train.py, or check the path')


def hub_file(repo_id):
    """Local path of what `choose` takes from a Hugging Face repository. Raises UserError."""
    try:
        hub = extra('huggingface_hub')
    except UserError as e:
        raise UserError(f'{repo_id} is not here; to ask the Hugging Face hub, {e}') from e
    try:
        name = choose([file.rfilename for file in hub.model_info(repo_id).siblings])
        if not name:
            raise FileNotFoundError(f'none of its files ends in {", ".join(SUFFIXES)}')
        print(f'{repo_id}: using {name}')
        return hub.hf_hub_download(repo_id, name)
    except Exception as e:  # its own, the HTTP library's or the system's
        raise UserError(f'{repo_id} is neither here nor to be had from the Hugging Face hub: '
                        f'{one_line(e)}') from e
